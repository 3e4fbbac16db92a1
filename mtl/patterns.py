r"""Name patterns: the one small language that says which tensors are meant.

It works on full names such as `trunk.layer1.0.conv1.weight` and on a small description of the module tree; it knows
nothing of tensors.

| form                                          | selects                                                          |
|-----------------------------------------------|------------------------------------------------------------------|
| `trunk.layer1`                                | that module or tensor and all below it; only at a dot            |
| `trunk.blocks.*.attn`, `**.bias`              | glob: `*` inside one segment, `**` across any number of segments |
| `trunk[:2]`, `trunk.blocks[-1].attn`          | children of a module by position, as Python slices a list        |
| `trunk@first:2`, `trunk@last:1`, `trunk@first:50%` | depth groups from the input on, or from the output back     |
| `type:BatchNorm2d`                            | all that hangs in modules of that class or a subclass            |
| `re:.*\.(weight|bias)`                       | regular expression that must match the whole name                |
| `~layer1`                                     | every name that contains the text                                |
| `!pattern`                                    | takes back; the last pattern that matches a name decides         |
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches

from mtl.nearest import hint


@dataclass(frozen=True)
class ModuleTree:
    """What patterns need to know of a module tree beyond the names of its tensors.

    Attributes:
        children: The names of each module's child modules in order, by the module's path; the root's path is "".
        classes: The names of each module's class and its bases, by path.
        depth_groups: The full parameter names of a module in groups from input to output, by its path.
    """

    children: Mapping[str, Sequence[str]] = field(default_factory=dict)
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    depth_groups: Callable[[str], Sequence[Sequence[str]]] = lambda _: []


NO_TREE = ModuleTree()


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
_SLICE = re.compile(r"(?P<before>[^\[\]]*)\[(?P<slice>[^\[\]]*)\](?P<after>.*)")
_BOUNDS = re.compile(r"-?\d+|-?\d*:-?\d*(?::(?:-?[1-9]\d*)?)?")
_DEPTH = re.compile(r"(?P<path>[^@]*)@(?P<end>first|last):(?P<number>\d+)(?P<percent>%?)")

Matcher = Callable[[str], bool]


def _matcher(text: str, index: int, tree: ModuleTree) -> Matcher:
    """What a pattern matches, whether it takes back or not."""
    body = text.removeprefix("!")
    if body.startswith("~"):
        if not body[1:]:
            raise PatternError(index, f"pattern {text!r} has no text after ~")
        return lambda name: body[1:] in name
    if body.startswith("re:"):
        try:
            expression = re.compile(body.removeprefix("re:"))
        except re.error as error:
            raise PatternError(index, f"pattern {text!r} is not a regular expression: {error}") from None
        return lambda name: expression.fullmatch(name) is not None
    if body.startswith("type:"):
        return _type_matcher(text, body.removeprefix("type:"), index, tree)
    if "@" in body:
        return _depth_matcher(text, body, index, tree)
    paths = list(_expand_slices(body, text, index, tree))
    if not paths:
        raise PatternError(index, f"pattern {text!r} matches nothing{_children_of(body, text, index, tree)}")
    expressions = [_path_expression(path, text, index) for path in paths]
    return lambda name: any(expression.match(name) for expression in expressions)


def _type_matcher(text: str, kind: str, index: int, tree: ModuleTree) -> Matcher:
    modules = {path for path, classes in tree.classes.items() if kind in classes}
    if not modules:
        known = sorted({classes[0] for classes in tree.classes.values()})
        raise PatternError(index, f"pattern {text!r} matches nothing: no module is a {kind!r}{hint(kind, known)}")
    return lambda name: any(parent in modules for parent in _parents(name))


def _depth_matcher(text: str, body: str, index: int, tree: ModuleTree) -> Matcher:
    parts = _DEPTH.fullmatch(body)
    if parts is None:
        raise PatternError(index, f"pattern {text!r} cannot be read: expected module@first:2, @last:1 or @first:50%")
    paths = [path for path in _module_paths(parts["path"], text, index, tree) if tree.depth_groups(path)]
    if not paths:
        raise PatternError(index, f"pattern {text!r} matches nothing: no module {parts['path']!r} has parameters")
    chosen: set[str] = set()
    for path in paths:
        groups, number = tree.depth_groups(path), int(parts["number"])
        # Half a group and more counts as one, and no percentage but 0 is nothing.
        count = max(min(number, 1), (len(groups) * number + 50) // 100) if parts["percent"] else number
        if not 1 <= count <= len(groups) or (parts["percent"] and number > 100):
            what = f"{number}{parts['percent']}"
            raise PatternError(index, f"pattern {text!r} asks for {what} of the {len(groups)} depth groups of {path!r}")
        chosen.update(
            name for group in (groups[:count] if parts["end"] == "first" else groups[-count:]) for name in group
        )
    return chosen.__contains__


def _expand_slices(body: str, text: str, index: int, tree: ModuleTree) -> Iterator[str]:
    """The pattern without its slices: one path for each child that they choose."""
    parts = _SLICE.fullmatch(body)
    if parts is None:
        yield body
        return
    if not _BOUNDS.fullmatch(parts["slice"]):
        raise PatternError(index, f"pattern {text!r} cannot be read at [{parts['slice']}]: expected [2], [-1] or [0:2]")
    numbers = [int(bound) if bound else None for bound in parts["slice"].split(":")]
    for path in _module_paths(parts["before"], text, index, tree):
        children = tree.children[path]
        if len(numbers) == 1:
            place = numbers[0] or 0
            chosen = children[place : place + 1 or None] if -len(children) <= place < len(children) else []
        else:
            chosen = children[slice(*numbers)]
        for child in chosen:
            yield from _expand_slices(f"{path}.{child}{parts['after']}".removeprefix("."), text, index, tree)


def _children_of(body: str, text: str, index: int, tree: ModuleTree) -> str:
    """What a slice that chooses nothing could have chosen from."""
    before = body.partition("[")[0]
    paths = _module_paths(before, text, index, tree)
    if not paths:
        return f": there is no module {before!r}"
    children = tree.children[paths[0]]
    return f" ({paths[0] or 'the model'!r} has {len(children)} children: {', '.join(children[:12])})"


def _module_paths(pattern: str, text: str, index: int, tree: ModuleTree) -> list[str]:
    """The modules whose whole path a pattern of names and globs matches; "" is the root."""
    if not pattern:
        return [""]
    expression = _path_expression(pattern, text, index)
    return [path for path in tree.children if path and (found := expression.match(path)) and found.end() == len(path)]


def _parents(name: str) -> Iterator[str]:
    """The paths of all modules around a tensor, the root's too."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _path_expression(body: str, text: str, index: int) -> re.Pattern[str]:
    """The regular expression of names joined by dots; it must match from the start of a name."""
    segments = body.split(".")
    for segment in segments:
        if not _SEGMENT.fullmatch(segment) or ("**" in segment and segment != "**"):
            raise PatternError(
                index,
                f"pattern {text!r} cannot be read at {segment!r}: expected names joined by dots, where * stands for any"
                " part of one segment and ** for any number of segments; or module[0:2], module@first:2, type:Class,"
                " re:expression, ~text; or ! before a pattern",
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
        matches = _matcher(pattern, index, tree)
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
