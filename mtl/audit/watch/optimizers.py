"""The facts that the audit reads of an optimizer: its parameters, whether it calls hooks, whether it skipped a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeGuard

from torch import Tensor
from torch.optim import Optimizer


class HoldsParameters(Protocol):
    """Anything that steps parameters: a torch optimizer, or a balancing method that updates its own."""

    param_groups: list[dict[str, Any]]


def fires_hooks(optimizer: HoldsParameters) -> TypeGuard[Optimizer]:
    """Whether the hooks that are registered on an optimizer's steps are called.

    torch arranges this in the constructor of the base class; a subclass that does not call it, or a wrapper, has none.
    """
    hooks = getattr(optimizer, "_optimizer_step_post_hooks", None)
    return isinstance(optimizer, Optimizer) and hooks is not None and getattr(type(optimizer).step, "hooked", False)


def was_skipped(optimizer: Optimizer) -> bool:
    """Whether a grad scaler made a fused optimizer skip its step; on a device False, since to know would be a sync."""
    overflow = getattr(optimizer, "found_inf", None)
    return isinstance(overflow, Tensor) and overflow.device.type == "cpu" and bool(overflow)


def optimizers_inside(optimizer: HoldsParameters) -> list[Optimizer]:
    """The optimizers whose hooks are called at the steps of this one: itself, or those that it wraps.

    Raises:
        TypeError: Neither it nor an optimizer inside it calls hooks for its parameters.
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
            f"the steps of a {type(optimizer).__name__} cannot be observed: it is no torch.optim.Optimizer whose"
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


def without(optimizers: list[HoldsParameters], optimizer: HoldsParameters) -> set[int]:
    """Removes an optimizer, or those inside a wrapper, from a list in place: an open phase reads the same list.

    Returns:
        The identities of the removed ones.

    Raises:
        ValueError: It is not in the list.
    """
    inner = [optimizer] if optimizer in optimizers else optimizers_inside(optimizer)
    gone = {id(each) for each in inner}
    if not any(id(each) in gone for each in optimizers):
        raise ValueError("expected an optimizer that is watched, got another one")
    optimizers[:] = [each for each in optimizers if id(each) not in gone]
    return gone


def param_groups(optimizers: Sequence[HoldsParameters]) -> list[dict[str, Any]]:
    """Every param group once: a wrapper shows the groups of the optimizer inside it."""
    return list({id(group): group for optimizer in optimizers for group in optimizer.param_groups}.values())


def ids_held(optimizers: Sequence[HoldsParameters]) -> set[int]:
    """The identities of the parameters in the optimizers."""
    return {id(parameter) for group in param_groups(optimizers) for parameter in group["params"]}
