"""Optimizer state by parameter name, kept from phase to phase."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mtl.optim.optimizers import parameters_of
from mtl.runtime.tensors import is_sharded, shard_like

# Options that do not change which state an optimizer has of a parameter.
_OF_NO_STATE = {
    *("lr", "weight_decay", "decoupled_weight_decay", "foreach", "fused", "capturable", "differentiable", "maximize"),
    *("betas", "eps", "alpha", "dampening", "nesterov", "momentum_decay"),
}


class OptimizerState:
    """The state of optimizers (momentum, second moments, step counts) by parameter name.

    An optimizer lives for one phase. Its state is collected at the phase's end and applied to the next optimizer of the
    same kind that holds the parameter, however many phases later: a thawed parameter continues from the state in which
    it was frozen. In between the state is in host memory. Optimizers are of one kind if they have the same class and
    the same options switched on, since options such as momentum or amsgrad decide which state there is.
    """

    def __init__(self) -> None:
        self._states: dict[str, dict[str, dict[str, Any]]] = {}

    def collect(self, optimizer: Optimizer, name_of: Mapping[Tensor, str]) -> None:
        """Adds the state of every parameter that an optimizer holds.

        Args:
            optimizer: An optimizer that steps no more, or to which the state is applied again.
            name_of: The names of its parameters.
        """
        own = self._states.setdefault(_kind_of_optimizer(optimizer), {})
        states = {name_of[key]: state for key, state in optimizer.state.items() if key in name_of}
        own.update({name: dict(state) for name, state in states.items() if state})

    def apply(self, optimizer: Optimizer, name_of: Mapping[Tensor, str]) -> list[str]:
        """Moves the state of an optimizer's parameters, as far as there is one, into the optimizer.

        Returns:
            The names of the parameters with a state.
        """
        own = self._states.get(_kind_of_optimizer(optimizer), {})
        parameters = parameters_of(optimizer)
        names = [name_of[parameter] for parameter in parameters]
        states = {
            number: {key: _in_layout_of(parameter, value) for key, value in own.pop(name).items()}
            for number, (name, parameter) in enumerate(zip(names, parameters, strict=True))
            if name in own
        }
        # torch's own `load_state_dict` puts each part of the state on the right device, in the right type.
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
        for unused in self._states.values():
            for name, state in unused.items():
                unused[name] = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in state.items()}
        return [names[number] for number in states]

    def drop(self, names: Collection[str]) -> None:
        """Drops the state of these parameters."""
        for by_name in self._states.values():
            for name in names:
                by_name.pop(name, None)

    def retain(self, names: Collection[str]) -> None:
        """Drops the state of all other parameters."""
        self._states = {kind: {n: own[n] for n in own if n in names} for kind, own in self._states.items()}

    def state_dict(self) -> dict[str, dict[str, dict[str, Any]]]:
        """By the optimizer's kind, the parameter's name, and the state's key: a tensor, number or None."""
        return {kind: {name: dict(state) for name, state in own.items()} for kind, own in self._states.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
        self._states = {kind: {name: dict(each) for name, each in own.items()} for kind, own in state.items()}


def _kind_of_optimizer(optimizer: Optimizer) -> str:
    options = {
        key for key, value in optimizer.defaults.items() if value is not None and value is not False and value != 0
    }
    switched_on = ",".join(sorted(options - _OF_NO_STATE))
    return f"{type(optimizer).__module__}:{type(optimizer).__qualname__}" + (f"[{switched_on}]" if switched_on else "")


def _in_layout_of(parameter: Tensor, value: Any) -> Any:
    """A state tensor with the parameter's strides, which fused kernels need, and sharded as the parameter is."""
    if isinstance(value, Tensor) and is_sharded(parameter):
        return shard_like(parameter, value)
    if not isinstance(value, Tensor) or value.shape != parameter.shape or value.stride() == parameter.stride():
        return value
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)
