"""Names for an optimizer's parameter groups, under which their learning rates are logged."""

from __future__ import annotations

from collections.abc import Sequence


def group_names(groups: Sequence[Sequence[str]], rates: Sequence[float]) -> list[str]:
    """A name for each group: the innermost module around all its parameters.

    Groups of one module and one rate, which differ in weight decay, share a name; with other rates, those after the
    first are numbered. A group of trunk and heads is `model`, one of a balancing method's weights `balance`.

    Args:
        groups: The full names of each group's parameters.
        rates: The peak learning rate of each group.
    """
    rates_of: dict[str, list[float]] = {}
    names = []
    for parameters, rate in zip(groups, rates, strict=True):
        name = _around(parameters)
        known = rates_of.setdefault(name, [])
        if rate not in known:
            known.append(rate)
        number = known.index(rate) + 1
        names.append(name if number == 1 else f"{name}-{number}")
    return names


def _around(parameters: Sequence[str]) -> str:
    first, *others = [name.split(".")[:-1] for name in parameters]
    depth = len(first)
    for modules in others:
        depth = next((at for at in range(depth) if modules[at : at + 1] != first[at : at + 1]), depth)
    if not depth:
        return "model"
    return "balance" if first[0] == "balance" else ".".join(first[:depth])
