"""What optimizers remember of parameters, kept by name from phase to phase."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mtl.optim.optimizers import held_by
from mtl.runtime.tensors import is_sharded, shard_like

# Options that do not change what an optimizer remembers of a parameter.
_OF_NO_STATE = {
    *("lr", "weight_decay", "decoupled_weight_decay", "foreach", "fused", "capturable", "differentiable", "maximize"),
    *("betas", "eps", "alpha", "dampening", "nesterov", "momentum_decay"),
}


class Moments:
    """What optimizers remember of parameters, by the parameters' names.

    Optimizers live for one phase. What one has gathered (momentum, second moments, step counts) is taken from it at the
    phase's end and given to the next one of the same kind that holds the parameter, however many phases later: a
    parameter that is thawed again goes on from the state in which it was frozen. Until then it rests in the host's
    memory. Optimizers are of one kind if they are of one class and have the same options switched on, since others
    would look for moments that are not there (momentum, amsgrad).
    """

    def __init__(self) -> None:
        self._kept: dict[str, dict[str, dict[str, Any]]] = {}

    def take(self, optimizer: Optimizer, name_of: Mapping[Tensor, str]) -> None:
        """Takes over the state of every parameter that an optimizer holds.

        Args:
            optimizer: An optimizer that steps no more, or is given its state back.
            name_of: The names of its parameters.
        """
        kept = self._kept.setdefault(_kind(optimizer), {})
        states = {name_of[key]: state for key, state in optimizer.state.items() if key in name_of}
        kept.update({name: dict(state) for name, state in states.items() if state})

    def give(self, optimizer: Optimizer, name_of: Mapping[Tensor, str]) -> list[str]:
        """Gives an optimizer the state of those of its parameters of which there is one; it is no longer kept here.

        Returns:
            The names of those parameters.
        """
        kept = self._kept.get(_kind(optimizer), {})
        parameters = held_by(optimizer)
        held = [name_of[parameter] for parameter in parameters]
        states = {
            number: {key: _in_layout_of(parameter, value) for key, value in kept.pop(name).items()}
            for number, (name, parameter) in enumerate(zip(held, parameters, strict=True))
            if name in kept
        }
        # torch's own way to load a state knows which parts of it belong on which device, in which type.
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
        for resting in self._kept.values():
            for name, state in resting.items():
                resting[name] = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in state.items()}
        return [held[number] for number in states]

    def forget(self, names: Collection[str]) -> None:
        """Drops what is kept of these parameters."""
        for kept in self._kept.values():
            for name in names:
                kept.pop(name, None)

    def keep_only(self, names: Collection[str]) -> None:
        """Drops what is kept of all other parameters."""
        self._kept = {kind: {n: kept[n] for n in kept if n in names} for kind, kept in self._kept.items()}

    def state_dict(self) -> dict[str, dict[str, dict[str, Any]]]:
        """By the optimizer's kind, the parameter's name, and the state's key: a tensor, number or None."""
        return {kind: {name: dict(state) for name, state in kept.items()} for kind, kept in self._kept.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
        self._kept = {kind: {name: dict(each) for name, each in kept.items()} for kind, kept in state.items()}


def _kind(optimizer: Optimizer) -> str:
    options = {
        key for key, value in optimizer.defaults.items() if value is not None and value is not False and value != 0
    }
    switched_on = ",".join(sorted(options - _OF_NO_STATE))
    return f"{type(optimizer).__module__}:{type(optimizer).__qualname__}" + (f"[{switched_on}]" if switched_on else "")


def _in_layout_of(parameter: Tensor, value: Any) -> Any:
    """A state tensor with the parameter's strides, for which an optimizer's fused loops ask; spread as it is."""
    if isinstance(value, Tensor) and is_sharded(parameter):
        return shard_like(parameter, value)
    if not isinstance(value, Tensor) or value.shape != parameter.shape or value.stride() == parameter.stride():
        return value
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)
