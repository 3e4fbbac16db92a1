r"""Name patterns: one small language to select tensors.

It works on full names such as `trunk.layer1.0.conv1.weight` and on a `ModuleTree`, without tensors.

| form                                          | selects                                                          |
|-----------------------------------------------|------------------------------------------------------------------|
| `trunk.layer1`                                | that module or tensor and all below it; only at a dot            |
| `trunk.blocks.*.attn`, `**.bias`              | glob: `*` inside one segment, `**` across any number of segments |
| `trunk[:2]`, `trunk.blocks[-1].attn`          | children of a module by position, as Python slices a list        |
| `trunk@first:2`, `trunk@last:1`, `trunk@first:50%` | depth groups, with their buffers, counted from input or output |
| `type:BatchNorm2d`, `type:norm`               | all tensors below modules of that class or a subclass; `norm` is |
|                                               | every normalisation layer of torch, timm and torchvision         |
| `re:.*\.(weight|bias)`                       | regular expression that must match the whole name                |
| `~layer1`                                     | every name that contains the text                                |
| `!pattern`                                    | deselects; the last pattern that matches a name decides          |
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from mtl.patterns.matching import NO_TREE, ModuleTree, PatternError, matcher

__all__ = [
    "NO_TREE",
    "Counted",
    "ModuleTree",
    "Partition",
    "PatternError",
    "PatternLike",
    "Selection",
    "as_list",
    "partition",
    "select",
    "text_of",
]


@dataclass(frozen=True)
class Counted:
    """A pattern that must match an exact number of names.

    Attributes:
        pattern: The pattern.
        must_match: How many names it has to match.
    """

    pattern: str
    must_match: int


PatternLike = str | Counted


def as_list(patterns: PatternLike | Sequence[PatternLike]) -> list[PatternLike]:
    """Patterns as a list; a single pattern becomes a list of one."""
    return [patterns] if isinstance(patterns, str | Counted) else list(patterns)


def text_of(pattern: PatternLike) -> str:
    """A pattern as it is written."""
    return pattern.pattern if isinstance(pattern, Counted) else pattern


@dataclass(frozen=True)
class Selection:
    """The result of matching a list of patterns against names.

    Attributes:
        names: The selected names, in the order given.
        decided_by: For every name that some pattern matched, the index of the last one that did.
    """

    names: tuple[str, ...]
    decided_by: dict[str, int]


@dataclass(frozen=True)
class Partition:
    """A freeze as names: each parameter and buffer is either frozen or not.

    Attributes:
        frozen: Frozen parameters.
        trainable: All other parameters.
        frozen_buffers: Buffers that must not change.
        free_buffers: All other buffers.
        decided_by: For each name that some pattern matched, the index of the pattern that decided.
    """

    frozen: tuple[str, ...]
    trainable: tuple[str, ...]
    frozen_buffers: tuple[str, ...]
    free_buffers: tuple[str, ...]
    decided_by: dict[str, int]


def select(patterns: Sequence[PatternLike], names: Sequence[str], tree: ModuleTree = NO_TREE) -> Selection:
    """Selects names by patterns; the last pattern that matches a name decides.

    Args:
        patterns: Patterns; those that start with `!` deselect.
        names: The names to select among, in any order.
        tree: The module tree of the names.

    Raises:
        PatternError: A pattern cannot be read, matches no name or not the number that it must, or deselects names that
            none before it selected.
    """
    selected: set[str] = set()
    decided_by: dict[str, int] = {}
    for index, entry in enumerate(patterns):
        pattern = text_of(entry)
        matches = matcher(pattern, index, tree)
        matched = [name for name in names if matches(name)]
        if not matched:
            raise PatternError(index, f"pattern {pattern!r} matches nothing{_near_misses(pattern, names)}")
        if isinstance(entry, Counted) and len(matched) != entry.must_match:
            raise PatternError(
                index, f"pattern {pattern!r} must match {entry.must_match} names, but matches {len(matched)}"
            )
        if pattern.startswith("!"):
            if selected.isdisjoint(matched):
                raise PatternError(
                    index,
                    f"pattern {pattern!r} deselects nothing:"
                    f" no pattern before it selects any of its {len(matched)} names; leave it out or move it down",
                )
            selected.difference_update(matched)
        else:
            selected.update(matched)
        decided_by |= dict.fromkeys(matched, index)
    return Selection(tuple(name for name in names if name in selected), decided_by)


def partition(
    patterns: Sequence[PatternLike],
    parameters: Sequence[str],
    buffers: Sequence[str],
    tree: ModuleTree = NO_TREE,
) -> Partition:
    """Partitions parameters and buffers into frozen and free ones.

    A buffer is frozen if the patterns select it, or if none matches it and every parameter of its own module is frozen:
    a BatchNorm whose weight and bias are frozen keeps its running statistics too, unless a pattern deselects them.

    Args:
        patterns: What to freeze; none freezes nothing.
        parameters: All parameter names, aliases included.
        buffers: All buffer names, aliases included.
        tree: The module tree of the names.

    Raises:
        PatternError: As `select`.
    """
    selection = select(patterns, [*parameters, *buffers], tree)
    frozen = set(selection.names)
    frozen_in: dict[str, list[bool]] = {}
    for name in parameters:
        frozen_in.setdefault(_module_of(name), []).append(name in frozen)
    frozen |= {
        name
        for name in buffers
        if name not in selection.decided_by and (flags := frozen_in.get(_module_of(name))) and all(flags)
    }
    return Partition(
        frozen=tuple(name for name in parameters if name in frozen),
        trainable=tuple(name for name in parameters if name not in frozen),
        frozen_buffers=tuple(name for name in buffers if name in frozen),
        free_buffers=tuple(name for name in buffers if name not in frozen),
        decided_by=selection.decided_by,
    )


def _module_of(name: str) -> str:
    return name.rpartition(".")[0]


def _near_misses(pattern: str, names: Sequence[str]) -> str:
    """A hint for a pattern that matches nothing: the nearest names, and the names at that place in the tree."""
    text = pattern.lstrip("!~")
    prefixes = sorted({name[:end] for name in names for end in [m.start() for m in re.finditer(r"\.|$", name)]})
    near = get_close_matches(text, prefixes, n=3, cutoff=0.75)
    parent, children = _deepest_parent(text, names)
    parts = []
    if near:
        parts.append(f"nearest: {', '.join(near)}")
    if children:
        shown = ", ".join(children[:12]) + (", ..." if len(children) > 12 else "")
        parts.append(f"below {parent!r} there are: {shown}" if parent else f"the names start with: {shown}")
    return f" ({'; '.join(parts)})" if parts else ""


def _deepest_parent(text: str, names: Collection[str]) -> tuple[str, list[str]]:
    """The longest dotted prefix of `text` under which there are names, and the next segments of these names."""
    parent = text
    while parent:
        parent = parent.rpartition(".")[0]
        start = f"{parent}." if parent else ""
        children = list(
            dict.fromkeys(name.removeprefix(start).split(".")[0] for name in names if name.startswith(start))
        )
        if children:
            return parent, children
    return "", []
