r"""Name patterns: the one small language that says which tensors are meant.

It works on full names such as `trunk.layer1.0.conv1.weight` and on a small description of the module tree; it knows
nothing of tensors.

| form                                          | selects                                                          |
|-----------------------------------------------|------------------------------------------------------------------|
| `trunk.layer1`                                | that module or tensor and all below it; only at a dot            |
| `trunk.blocks.*.attn`, `**.bias`              | glob: `*` inside one segment, `**` across any number of segments |
| `trunk[:2]`, `trunk.blocks[-1].attn`          | children of a module by position, as Python slices a list        |
| `trunk@first:2`, `trunk@last:1`, `trunk@first:50%` | depth groups, with their buffers, from the input on, or back |
| `type:BatchNorm2d`                            | all that hangs in modules of that class or a subclass            |
| `re:.*\.(weight|bias)`                       | regular expression that must match the whole name                |
| `~layer1`                                     | every name that contains the text                                |
| `!pattern`                                    | takes back; the last pattern that matches a name decides         |
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
    """One pattern alone is a list of one."""
    return [patterns] if isinstance(patterns, str | Counted) else list(patterns)


def text_of(pattern: PatternLike) -> str:
    """A pattern as it is written."""
    return pattern.pattern if isinstance(pattern, Counted) else pattern


@dataclass(frozen=True)
class Selection:
    """What a list of patterns selects among some names.

    Attributes:
        names: The selected names, in the order given.
        decided_by: For every name that some pattern matched, the index of the last one that did.
    """

    names: tuple[str, ...]
    decided_by: dict[str, int]


@dataclass(frozen=True)
class Partition:
    """Every parameter and buffer on one side of the line: a freeze as names.

    Attributes:
        frozen: Frozen parameters.
        trainable: All other parameters.
        frozen_buffers: Buffers that must not move either.
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
        patterns: Patterns, of which those that start with `!` take back.
        names: The names to select among, in any order.
        tree: The module tree that the names hang in.

    Raises:
        PatternError: A pattern cannot be read, matches none of the names or not as many as it must, or takes back what
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
                    f"pattern {pattern!r} takes nothing back:"
                    f" no pattern before it selects any of its {len(matched)} names",
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
    """Draws the line between frozen and trainable.

    A buffer is frozen if the patterns select it by name, or if they say nothing of it and every parameter beside it in
    its module is frozen: a BatchNorm whose weight and bias are frozen keeps its running statistics too, unless they are
    taken back by name.

    Args:
        patterns: What to freeze; none freezes nothing.
        parameters: All parameter names, aliases included.
        buffers: All buffer names, aliases included.
        tree: The module tree that the names hang in.

    Raises:
        PatternError: As `select`.
    """
    selection = select(patterns, [*parameters, *buffers], tree)
    frozen = set(selection.names)
    beside: dict[str, list[bool]] = {}
    for name in parameters:
        beside.setdefault(_module_of(name), []).append(name in frozen)
    frozen |= {
        name
        for name in buffers
        if name not in selection.decided_by and all(beside.get(_module_of(name), [])) and beside.get(_module_of(name))
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
    """What the writer of a dead pattern may have meant: the nearest names, else what there is at that place."""
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
    """The longest dotted start of `text` under which names exist, and the segments that follow it there."""
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
