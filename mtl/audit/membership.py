"""Which parameters the optimizers hold: no frozen one, and every trainable one in exactly one group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeGuard

from torch import Tensor
from torch.optim import Optimizer

from mtl.audit.contract import Contract
from mtl.audit.places import Place


class HoldsParameters(Protocol):
    """Anything that steps parameters: a torch optimizer, or a balancing method that updates its own."""

    param_groups: list[dict[str, Any]]


def tells_of_steps(optimizer: HoldsParameters) -> TypeGuard[Optimizer]:
    """Whether hooks can be hung on its steps; a wrapper that only looks like an optimizer may have none."""
    return isinstance(optimizer, Optimizer) and hasattr(optimizer, "_optimizer_step_post_hooks")


def checked(optimizers: Sequence[HoldsParameters]) -> list[HoldsParameters]:
    """The optimizers as a list.

    Raises:
        TypeError: It is no list of optimizers.
    """
    if hasattr(optimizers, "param_groups") or not all(hasattr(each, "param_groups") for each in optimizers):
        raise TypeError(f"expected a list of optimizers, each with param_groups, got {optimizers!r}")
    return list(optimizers)


def param_groups(optimizers: Sequence[HoldsParameters]) -> list[dict[str, Any]]:
    """Every group once: an optimizer around another one shows that one's groups."""
    return list({id(group): group for optimizer in optimizers for group in optimizer.param_groups}.values())


class Membership:
    """Compares what the optimizers hold with the contract, anew whenever one of the two has changed."""

    def __init__(self, contract: Contract) -> None:
        whole = [place for place in contract.frozen if place.is_held_whole]
        self._frozen = [(place, tensor) for place in whole if (tensor := place.look()) is not None]
        # What hangs in a Python list is not expected in an optimizer: a teacher may be hidden there on purpose.
        free = [place for place in contract.free if place.kind == "param" and not place.hidden]
        self._free = [(place, tensor) for place in free if (tensor := place.look()) is not None]
        self._seen: tuple[list[int], list[bool]] | None = None

    @property
    def free(self) -> dict[str, Tensor]:
        """The parameters that are not frozen, by every name."""
        return {place.name: tensor for place, tensor in self._free}

    def is_outdated(self) -> bool:
        """Whether another tensor hangs by now where a parameter hung."""
        return any(place.look() is not tensor for place, tensor in self._free)

    def look(self, optimizers: Sequence[HoldsParameters]) -> Iterator[tuple[str, Place]]:
        """Yields the kind of each violation with its place; nothing if nothing has changed since the last look."""
        held = [id(p) for group in param_groups(optimizers) for p in group["params"]]
        asks = [tensor.requires_grad for _, tensor in self._free]
        if (held, asks) == self._seen:
            return
        self._seen = held, asks
        times = Counter(held)
        yield from (("in_optimizer", place) for place, tensor in self._frozen if times[id(tensor)])
        if not optimizers:
            return
        for place, tensor in self._free:
            if times[id(tensor)] > 1:
                yield "in_several_groups", place
            elif tensor.requires_grad and not times[id(tensor)]:
                yield "not_in_optimizer", place
