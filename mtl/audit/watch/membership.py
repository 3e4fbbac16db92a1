"""Which parameters the optimizers hold: no frozen one, and every trainable one in exactly one group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeGuard

from torch import Tensor
from torch.optim import Optimizer

from mtl.audit.watch.contract import Contract
from mtl.audit.watch.places import Place
from mtl.audit.watch.rotation import A_LOOK, AT_FIRST, Turns


class HoldsParameters(Protocol):
    """Anything that steps parameters: a torch optimizer, or a balancing method that updates its own."""

    param_groups: list[dict[str, Any]]


def fires_hooks(optimizer: HoldsParameters) -> TypeGuard[Optimizer]:
    """Whether the hooks that are registered on an optimizer's steps are called.

    torch sees to it in the constructor of the base class; a subclass that does not call it, or a wrapper, has none.
    """
    hooks = getattr(optimizer, "_optimizer_step_post_hooks", None)
    return isinstance(optimizer, Optimizer) and hooks is not None and getattr(type(optimizer).step, "hooked", False)


def was_skipped(optimizer: Optimizer) -> bool:
    """Whether a grad scaler had a fused optimizer leave its parameters alone; on a device, nobody waits to know."""
    overflow = getattr(optimizer, "found_inf", None)
    return isinstance(overflow, Tensor) and overflow.device.type == "cpu" and bool(overflow)


def optimizers_inside(optimizer: HoldsParameters) -> list[Optimizer]:
    """The optimizers that do the steps of one that is to be listened to: itself, or those that it wraps.

    Raises:
        TypeError: Nothing in it tells of its steps.
    """
    if fires_hooks(optimizer):
        return [optimizer]
    found: dict[int, Optimizer] = {}
    waiting: list[object] = list(getattr(optimizer, "__dict__", {}).values())
    for value in waiting:
        if isinstance(value, list | tuple):
            waiting += value
        elif isinstance(value, dict):
            waiting += value.values()
        elif hasattr(value, "param_groups") and value is not optimizer and id(value) not in found:
            found |= {id(each): each for each in optimizers_inside(value)}
    mine, theirs = ids_held([optimizer]), ids_held([*found.values()])
    if not found or not mine <= theirs:
        raise TypeError(
            f"the steps of a {type(optimizer).__name__} cannot be seen: it is no torch.optim.Optimizer whose"
            " constructor was called, and wraps none that holds its parameters; call after_backward() and after_step()"
            " in the loop"
        )
    return list(found.values())


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


def ids_held(optimizers: Sequence[HoldsParameters]) -> set[int]:
    """The identities of the parameters that the optimizers hold."""
    return {id(parameter) for group in param_groups(optimizers) for parameter in group["params"]}


# Where a parameter is registered, its key there, and the parameter.
_Row = tuple[Mapping[str, Tensor | None], str, Tensor]


class Membership:
    """Compares what the optimizers hold with the contract, anew whenever one of the two has changed."""

    def __init__(self, contract: Contract) -> None:
        whole = [place for place in contract.frozen if place.is_held_whole]
        self._frozen = [(place, tensor) for place in whole if (tensor := place.look()) is not None]
        # What hangs in a Python list is not expected in an optimizer: a teacher may be hidden there on purpose.
        free = [place for place in contract.free if place.kind == "param" and not place.hidden]
        self._free = [(place, tensor) for place in free if (tensor := place.look()) is not None]
        rows: list[_Row] = [(place.held, place.key, tensor) for place, tensor in self._free]
        self._turns: Turns[_Row] = Turns(rows, 16)
        self._seen: tuple[list[int], list[bool]] | None = None

    @property
    def free(self) -> dict[str, Tensor]:
        """The parameters that are not frozen, by every name."""
        return {place.name: tensor for place, tensor in self._free}

    def is_outdated(self, step: int) -> bool:
        """Whether another tensor hangs by now where a parameter hung; of many, they are looked at in turn."""
        return any(key not in held or held[key] is not tensor for held, key, tensor in self._turns.due(step))

    def is_due(self, step: int) -> bool:
        """Whether to look after a step: the more there are, the less often."""
        return self._seen is None or step <= AT_FIRST or step % (1 + len(self._free) // A_LOOK) == 0

    def forget(self) -> None:
        """Has the next look say all again."""
        self._seen = None

    def look(
        self, optimizers: Sequence[HoldsParameters], replaced: Collection[int] = ()
    ) -> Iterator[tuple[str, Place]]:
        """Yields the kind of each breach with its place; nothing if nothing has changed since the last look.

        Args:
            optimizers: The optimizers.
            replaced: The identities of those in whose place others step by now; what only they hold counts as held.
        """
        held = [id(p) for group in param_groups(optimizers) for p in group["params"]]
        asks = [tensor.requires_grad for _, tensor in self._free]
        if (held, asks) == self._seen:
            return
        self._seen = held, asks
        times = Counter(held)
        yield from (("in_optimizer", place) for place, tensor in self._frozen if times[id(tensor)])
        if not optimizers:
            return
        active = param_groups([each for each in optimizers if id(each) not in replaced])
        stepping = Counter(id(p) for group in active for p in group["params"])
        for place, tensor in self._free:
            if stepping[id(tensor)] > 1:
                yield "in_several_groups", place
            elif tensor.requires_grad and not times[id(tensor)]:
                yield "not_in_optimizer", place
