"""Name patterns: the one small language that says which tensors are meant.

It works on full names such as `trunk.layer1.0.conv1.weight`; it knows nothing of tensors.

| form                    | selects                                                                      |
|-------------------------|------------------------------------------------------------------------------|
| `trunk.layer1`          | that module or tensor and all below it; only at a dot, so never `layer10`     |
| `trunk.blocks.*.attn`   | glob: `*` inside one segment, `**` across any number of segments              |
| `~layer1`               | every name that contains the text: the classic `any(x in name ...)` loop      |
| `!pattern`              | takes back; the last pattern that matches a name decides                      |
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from difflib import get_close_matches


class PatternError(ValueError):
    """A pattern that cannot be read, or that selects nothing.

    Attributes:
        index: Its place in the list of patterns.
    """

    def __init__(self, index: int, message: str) -> None:
        super().__init__(message)
        self.index = index


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


_SEGMENT = re.compile(r"\*\*|[\w*\-]+")


def _compile(text: str, index: int) -> re.Pattern[str]:
    """The regular expression of a pattern, whether it takes back or not; it must match from the start of a name."""
    body = text.removeprefix("!")
    if body.startswith("~"):
        if not body[1:]:
            raise PatternError(index, f"pattern {text!r} has no text after ~")
        return re.compile(f".*{re.escape(body[1:])}")
    segments = body.split(".")
    for segment in segments:
        if not _SEGMENT.fullmatch(segment) or ("**" in segment and segment != "**"):
            raise PatternError(
                index,
                f"pattern {text!r} cannot be read at {segment!r}: expected names joined by dots, where * stands for any"
                " part of one segment and ** for any number of segments; or ~text; or ! before a pattern",
            )
    expression = ""
    for place, segment in enumerate(segments):
        last = place == len(segments) - 1
        if segment == "**" and last:
            expression = expression.removesuffix(r"\.") + (r"(?:\..*)?" if place else ".*")
        elif segment == "**":
            expression += r"(?:[^.]+\.)*"
        else:
            expression += re.escape(segment).replace(r"\*", "[^.]*") + ("" if last else r"\.")
    return re.compile(rf"{expression}(?=\.|$)")


def select(patterns: Sequence[str], names: Sequence[str]) -> Selection:
    """Selects names by patterns; the last pattern that matches a name decides.

    Args:
        patterns: Patterns, of which those that start with `!` take back.
        names: The names to select among, in any order.

    Raises:
        PatternError: A pattern cannot be read, matches none of the names, or takes back what none before it selected.
    """
    selected: set[str] = set()
    decided_by: dict[str, int] = {}
    for index, pattern in enumerate(patterns):
        takes_back = pattern.startswith("!")
        expression = _compile(pattern, index)
        matched = [name for name in names if expression.match(name)]
        if not matched:
            raise PatternError(index, f"pattern {pattern!r} matches nothing{_near_misses(pattern, names)}")
        if takes_back and selected.isdisjoint(matched):
            raise PatternError(
                index,
                f"pattern {pattern!r} takes nothing back: no pattern before it selects any of its {len(matched)} names",
            )
        decided_by |= dict.fromkeys(matched, index)
        if takes_back:
            selected.difference_update(matched)
        else:
            selected.update(matched)
    return Selection(tuple(name for name in names if name in selected), decided_by)


def partition(patterns: Sequence[str], parameters: Sequence[str], buffers: Sequence[str]) -> Partition:
    """Draws the line between frozen and trainable.

    A buffer is frozen if the patterns select it by name, or if they say nothing of it and every parameter beside it in
    its module is frozen: a BatchNorm whose weight and bias are frozen keeps its running statistics too, unless they are
    taken back by name.

    Args:
        patterns: What to freeze; none freezes nothing.
        parameters: All parameter names, aliases included.
        buffers: All buffer names, aliases included.

    Raises:
        PatternError: As `select`.
    """
    selection = select(patterns, [*parameters, *buffers])
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
