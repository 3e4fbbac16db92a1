"""Which parameters the optimizers hold: no frozen one, and every trainable one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor

from mtl.audit.contract import Place


class HoldsParameters(Protocol):
    """Anything that steps parameters: a torch optimizer, or a balancing method that updates its own."""

    param_groups: list[dict[str, Any]]


class Membership:
    """Compares what the optimizers hold with the contract, anew whenever one of the two has changed."""

    def __init__(self, frozen: Sequence[Place], free: Sequence[Place]) -> None:
        self._frozen = [(place, tensor) for place in frozen if (tensor := place.look()) is not None]
        free_parameters = [place for place in free if place.kind == "param"]
        self._free = [(place, tensor) for place in free_parameters if (tensor := place.look()) is not None]
        self._seen: tuple[list[int], list[bool]] | None = None

    def look(self, optimizers: Sequence[HoldsParameters]) -> Iterator[tuple[str, Place]]:
        """Yields the kind of each violation with its place; nothing if nothing has changed since the last look."""
        held = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        asks = [tensor.requires_grad for _, tensor in self._free]
        if (held, asks) == self._seen:
            return
        self._seen = held, asks
        ids = set(held)
        yield from (("in_optimizer", place) for place, tensor in self._frozen if id(tensor) in ids)
        if optimizers:
            yield from (("not_in_optimizer", place) for place, tensor in self._free if _is_left_out(tensor, ids))


def _is_left_out(tensor: Tensor, held: set[int]) -> bool:
    return tensor.requires_grad and id(tensor) not in held
