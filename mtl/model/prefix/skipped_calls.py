"""The results of skipped module calls in a replay: kept tensors, and placeholders of the right shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_unflatten

from mtl.model.prefix.cut import Cut, Extent
from mtl.model.prefix.trace import Call, Trace


@dataclass(frozen=True)
class KeptTensor:
    """A tensor that is kept.

    Attributes:
        shape: For one image.
        dtype: Its type.
        order: Its dimensions, batch included, from the widest stride to the narrowest.
        changes: Whether a plain pass changes it in place later on.
        changes_in_replay: Whether a replay does.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    order: tuple[int, ...]
    changes: bool
    changes_in_replay: bool

    def laid_out(self, tensor: Tensor) -> Tensor:
        """The tensor in the recorded memory layout: a convolution computes in the layout of its input."""
        strides, stride = [0] * tensor.ndim, 1
        for dimension in reversed(self.order):
            strides[dimension] = stride
            stride *= tensor.shape[dimension]
        if list(tensor.stride()) != strides:
            return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
        return tensor.clone() if self.changes_in_replay else tensor


@dataclass(frozen=True)
class Placeholder:
    """A tensor of which a replay reads the shape only, not the values."""

    shape: tuple[Extent, ...]
    dtype: torch.dtype
    is_written: bool = False

    def make(self, batch: int, device: torch.device) -> Tensor:
        """One value for all elements: NaN for floats, so that an unexpected read shows in the result."""
        number = math.nan if self.dtype.is_floating_point else 0
        tensor = torch.full((), number, dtype=self.dtype, device=device).expand([size.of(batch) for size in self.shape])
        return tensor.contiguous() if self.is_written else tensor


@dataclass(frozen=True)
class Slot:
    """One leaf of a module's output: the index of a kept tensor, else a placeholder, else a plain value."""

    kept: int | None = None
    placeholder: Placeholder | None = None
    plain: Any = None

    def fill(self, kept: Sequence[Tensor], batch: int, device: torch.device) -> Any:
        """The leaf in a replay of `batch` images."""
        if self.kept is not None:
            return kept[self.kept]
        return self.plain if self.placeholder is None else self.placeholder.make(batch, device)


@dataclass(frozen=True)
class Skip:
    """The output of a skipped call, flattened."""

    slots: list[Slot]
    spec: TreeSpec

    def output(self, kept: Sequence[Tensor], batch: int, device: torch.device) -> Any:
        """The result of the call in a replay of `batch` images."""
        return tree_unflatten([slot.fill(kept, batch, device) for slot in self.slots], self.spec)


def plan_skips(trace: Trace, cut: Cut) -> dict[nn.Module, list[Skip | None]]:
    """For every skipped module, an entry for each of its calls outside skipped modules; None for a call that runs."""
    plan: dict[nn.Module, list[Skip | None]] = {trace.calls[number].module: [] for number in cut.skipped}
    skipped, inside = set(cut.skipped), set[int]()
    for number, call in enumerate(trace.calls):
        if call.parent in inside:
            inside.add(number)
            continue
        if number in skipped:
            inside.add(number)
        if number and call.module in plan:
            plan[call.module].append(_skip(trace, cut, call) if number in skipped else None)
    return plan


def _skip(trace: Trace, cut: Cut, call: Call) -> Skip:
    slots = []
    for leaf, is_tensor in zip(call.leaves, call.is_tensor, strict=True):
        if not is_tensor:
            slots.append(Slot(plain=leaf))
        elif leaf in cut.kept:
            slots.append(Slot(kept=cut.kept.index(leaf)))
        else:
            slots.append(Slot(placeholder=placeholder(trace, cut, leaf)))
    assert call.spec is not None
    return Skip(slots, call.spec)


def placeholder(trace: Trace, cut: Cut, value: int) -> Placeholder:
    tensor = trace.values[value].tensor
    return Placeholder(cut.shapes[value], tensor.dtype, trace.values[value].storage in cut.changed)


def kept_tensor(trace: Trace, cut: Cut, number: int) -> KeptTensor:
    value = trace.values[number]
    strides = value.tensor.stride()
    order = sorted(range(len(strides)), key=lambda dimension: -strides[dimension])
    return KeptTensor(
        tuple(size.number for size in cut.shapes[number][1:]),
        value.tensor.dtype,
        tuple(order),
        value.tensor._version != value.version,
        value.storage in cut.changed,
    )
