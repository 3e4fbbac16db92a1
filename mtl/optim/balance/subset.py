"""Balancing in a step of whose tasks some have no label: these leave it, as if the method had fewer tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from mtl.optim.balance.scalarizers import FAMO, Scalarizer

# Attributes that every torch module has.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


@dataclass(frozen=True)
class Subset:
    """Some of the tasks of a balancing method.

    Attributes:
        places: Their places among all, in order.
        size: How many there are in all.
    """

    places: tuple[int, ...]
    size: int

    def index(self, device: torch.device) -> Tensor:
        """The places as an index; made once for each device, so that no step waits for the copy."""
        return _index(self.places, device)

    def others(self, device: torch.device) -> Tensor:
        """Which of all tasks are not among these, "t", bool."""
        return torch.ones(self.size, dtype=torch.bool, device=device).index_fill(0, self.index(device), False)

    def narrow(self, tensor: Tensor) -> Tensor:
        """The entries of these tasks, of a tensor all of whose axes have an entry a task; of another, all."""
        if not self.is_by_task(tensor):
            return tensor
        index = self.index(tensor.device)
        for axis in range(tensor.ndim):
            tensor = tensor.index_select(axis, index)
        return tensor

    def is_by_task(self, value: object) -> bool:
        """Whether a value is a tensor all of whose axes have an entry a task."""
        return isinstance(value, Tensor) and value.ndim > 0 and set(value.shape) == {self.size}

    def widen(self, narrowed: Tensor, before: Tensor | None) -> Tensor:
        """The opposite of `narrow`: other tasks have their entries of before, or 0."""
        axes = narrowed.ndim
        whole = narrowed.new_zeros([self.size] * axes) if before is None else before.clone()
        index = self.index(narrowed.device)
        whole[index if axes == 1 else torch.meshgrid(*[index] * axes, indexing="ij")] = narrowed
        return whole


@lru_cache(maxsize=64)
def _index(places: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(places, dtype=torch.int64, device=device)


def entry_for_each(option: str, values: Sequence[float], num_tasks: int) -> Tensor:
    """An option that has an entry for each task, "t", float64.

    Raises:
        ValueError: It has another number of entries.
        TypeError: It is not a list of numbers.
    """
    if len(values) != num_tasks:
        raise ValueError(f"expected {option} with an entry for each of {num_tasks} tasks, got {values}")
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def combine(scalarizer: Scalarizer, losses: Tensor, subset: Subset) -> Tensor:
    """What a scalarizer makes of the losses of some of its tasks.

    Whatever it holds that has an entry a task (weights, reference points, learned scales) is narrowed to these tasks.

    Args:
        scalarizer: Holds tensors as parameters and buffers.
        losses: Those of these tasks, in order.
        subset: Which tasks.

    Returns:
        The loss, a scalar.
    """
    held = {**dict(scalarizer.named_parameters()), **dict(scalarizer.named_buffers())}
    narrowed = {name: subset.narrow(value) for name, value in held.items()}
    total: Tensor = functional_call(scalarizer, narrowed, (losses,))
    return total


@torch.no_grad()
def update_famo(famo: FAMO, losses: Tensor, subset: Subset) -> None:
    """Passes the losses after a step to FAMO: the logits of other tasks, and their optimizer state, stay as they are.

    Args:
        famo: Was called with the losses of these tasks before the step.
        losses: Those after it.
        subset: Which tasks.
    """
    inside: Any = famo
    index, neutral = subset.index(losses.device), famo.min_losses.to(losses) + 1
    inside._prev_losses = neutral.index_copy(0, index, inside._prev_losses)
    # Its optimizer is made by its first step.
    with others_unmoved([inside._w], lambda: inside._optimizer, subset):
        # A softmax gives them no weight.
        inside._w.masked_fill_(subset.others(losses.device), -torch.inf)
        famo.update(neutral.index_copy(0, index, losses))


@contextmanager
def others_unmoved(
    parameters: Sequence[nn.Parameter], optimizer: Callable[[], Optimizer | None], subset: Subset
) -> Iterator[None]:
    """Restores, after a step, the entries of other tasks: of parameters with an entry a task, and of their state.

    Args:
        parameters: Those of the balancing method that step in the block.
        optimizer: Gives what steps them; None as long as it is not made.
        subset: The tasks that the step is for.
    """
    own = [parameter for parameter in parameters if subset.is_by_task(parameter)]
    before = [{name: v.clone() for name, v in _by_task(p, optimizer(), subset).items()} for p in own]
    yield
    with torch.no_grad():
        for parameter, values in zip(own, before, strict=True):
            for name, now in _by_task(parameter, optimizer(), subset).items():
                # State that is new begins with zeros.
                old = values.get(name, torch.zeros_like(now))
                now.copy_(torch.where(subset.others(now.device), old, now))


def _by_task(parameter: nn.Parameter, optimizer: Optimizer | None, subset: Subset) -> dict[str, Tensor]:
    """A parameter, under an empty name, and what its optimizer keeps for each of its entries."""
    state = {} if optimizer is None else optimizer.state.get(parameter, {})
    return {"": parameter.detach(), **{name: value for name, value in state.items() if subset.is_by_task(value)}}


@contextmanager
def narrowed(module: nn.Module, subset: Subset) -> Iterator[None]:
    """Narrows whatever a weighting and its parts hold to some tasks; what they hold afterwards is widened again."""
    before: list[tuple[nn.Module, str, Any]] = []
    for part in module.modules():
        for name, value in [*part._buffers.items(), *plain_attributes(part).items()]:
            before.append((part, name, value))
            if subset.is_by_task(value):
                setattr(part, name, subset.narrow(value))
            elif name == "_state_key":
                setattr(part, name, _with_number(value, subset.size, len(subset.places)))
    try:
        yield
    finally:
        for part, name, value in before:
            now = getattr(part, name)
            if name == "_state_key":
                setattr(part, name, _with_number(now, len(subset.places), subset.size))
            elif subset.is_by_task(value):
                setattr(part, name, subset.widen(now, value))
            elif value is None and isinstance(now, Tensor) and set(now.shape) == {len(subset.places)}:
                setattr(part, name, subset.widen(now, None))


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """A module's own attributes that are neither parameters nor buffers."""
    return {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}


def _with_number(key: Any, old: int, new: int) -> Any:
    """A key of a state, which names the number of tasks, with another number."""
    if isinstance(key, tuple):
        return tuple(_with_number(each, old, new) for each in key)
    return new if key == old and isinstance(key, int) else key
