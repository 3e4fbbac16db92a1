"""The parts of a model in which a freeze is shown: depth groups of the trunk, heads, and what else has parameters."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from mtl.patterns.module_tree import depth_groups, join
from mtl.phases.plan.records import PartPlan
from mtl.runtime.text import condense


def model_parts(root: nn.Module, parameters: Collection[str]) -> dict[str, list[str]]:
    """The names of parameters by part of the model, the trunk's depth groups from the input on first.

    Args:
        root: The module around trunk, heads and balance.
        parameters: The names of all parameters, each tensor once.
    """
    trunk = [[join("trunk", name) for name in group] for group in depth_groups(root.get_submodule("trunk"))]
    groups = [[name for name in group if name in parameters] for group in trunk]
    width = max(2, len(str(len(groups) - 1)))
    parts = {
        f"{number:0{width}d} {condense(group, parameters)[0].removeprefix('trunk.')}": group
        for number, group in enumerate(groups)
        if group
    }
    for name in parameters:
        first, *rest = name.split(".")
        if first != "trunk":
            parts.setdefault(join(first, rest[0]) if first != "balance" and len(rest) > 1 else first, []).append(name)
    return parts


def part_plans(
    parts: Mapping[str, Collection[str]], frozen: Collection[str], unreached: Collection[str]
) -> tuple[PartPlan, ...]:
    """The treatment of each part in a phase, given the frozen parameters and those that no task reaches."""
    is_frozen, is_unreached = frozenset(frozen), frozenset(unreached)
    return tuple(
        PartPlan(name, len(names), len(is_frozen.intersection(names)), len(is_unreached.intersection(names)))
        for name, names in parts.items()
    )
