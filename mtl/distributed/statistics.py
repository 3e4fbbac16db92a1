"""The statistics of metrics, merged over all processes: `World.merge_metrics` is the way in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class HasStatistics(Protocol):
    """Statistics of a part of a data set, which are added to those of another part, or else joined with them."""

    adds_up: bool

    def state(self) -> list[Tensor]: ...

    def load_state(self, state: Sequence[Tensor]) -> None: ...


def sum_statistics(each: Sequence[HasStatistics]) -> None:
    """Sums statistics over the processes, integers exactly, floats in their own precision."""
    # On the CPU, where they are read next.
    states = [[tensor.detach().cpu() for tensor in one.state()] for one in each]
    everything = [tensor for state in states for tensor in state]
    summed: dict[int, Tensor] = {}
    for dtype in sorted({tensor.dtype for tensor in everything}, key=str):
        places = [place for place, tensor in enumerate(everything) if tensor.dtype == dtype]
        flat = torch.cat([everything[place].flatten() for place in places])
        dist.all_reduce(flat)
        parts = flat.split_with_sizes([everything[place].numel() for place in places])
        summed |= {place: part.view_as(everything[place]) for place, part in zip(places, parts, strict=True)}
    start = 0
    for one, state in zip(each, states, strict=True):
        one.load_state([summed[place] for place in range(start, start + len(state))])
        start += len(state)


def join_statistics(each: Sequence[HasStatistics], world_size: int) -> None:
    """Joins statistics of all processes along their first axis, in the order of the ranks."""
    for one in each:
        states: list[Any] = [None] * world_size
        dist.all_gather_object(states, [tensor.detach().cpu() for tensor in one.state()])
        one.load_state([torch.cat(parts) for parts in zip(*states, strict=True)])
