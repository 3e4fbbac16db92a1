"""Rows of gradients that are split over the ranks, as the parameters are that they belong to (FSDP)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mtl.distributed.world import World
from mtl.runtime.tensors import local, shard_offsets, sharded_as


@dataclass(frozen=True)
class RowShards:
    """Which entries of rows this rank has: those of its shards of some parameters, one parameter after the other.

    Attributes:
        world: The ranks.
        parameters: Sharded on their first axis, in the order of the rows.
    """

    world: World
    parameters: Sequence[Tensor]

    @cached_property
    def size(self) -> int:
        """How many entries whole rows have."""
        return sum(parameter.numel() for parameter in self.parameters)

    def here(self, whole: Tensor) -> Tensor:
        """This rank's entries of whole rows, "... p"."""
        parts = torch.split(whole, [parameter.numel() for parameter in self.parameters], dim=-1)
        own = []
        for part, parameter in zip(parts, self.parameters, strict=True):
            first = shard_offsets(parameter)[0] * (parameter.numel() // max(1, parameter.shape[0]))
            own.append(part[..., first : first + local(parameter).numel()])
        return torch.cat(own, dim=-1)

    def by_parameter(self, rows: Tensor) -> ShardedRows:
        """This rank's entries of rows, "t p", as sharded tensors "t ...", one for each parameter."""
        here = [local(parameter) for parameter in self.parameters]
        parts = torch.split(rows, [each.numel() for each in here], dim=1)
        shaped = [part.reshape(len(rows), *each.shape) for part, each in zip(parts, here, strict=True)]
        return ShardedRows(self, [sharded_as(*pair) for pair in zip(self.parameters, shaped, strict=True)])


class ShardedRows(list[Tensor]):
    """Rows by parameter, as sharded tensors; in a checkpoint they are a list of whole tensors."""

    def __init__(self, shards: RowShards, tensors: Sequence[Tensor]) -> None:
        super().__init__(tensors)
        self.shards = shards


def row_of(by_parameter: Sequence[Tensor]) -> Tensor:
    """Rows, "t p", of tensors "t ...", one for each parameter; of sharded ones this rank's entries."""
    return torch.cat([local(each).flatten(1) for each in by_parameter], dim=1)
