"""One pattern as a predicate on names, built from its text and the module tree."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mtl.runtime.text import hint, parents


@dataclass(frozen=True)
class ModuleTree:
    """The structure of a module tree as patterns use it, besides the names of tensors.

    Attributes:
        children: The names of each module's child modules in order, by the module's path; the root's path is "".
        classes: The names of each module's class and its bases, and `norm` for a normalisation layer, by path.
        depths: The depth group of each tensor and module in a module, 0 at the input, by their full names; by the
            module's path. Empty for a module without parameters.
    """

    children: Mapping[str, Sequence[str]] = field(default_factory=dict)
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    depths: Callable[[str], Mapping[str, int]] = lambda _: {}


NO_TREE = ModuleTree()
# What `type:` takes for every normalisation layer.
NORM = "norm"


class PatternError(ValueError):
    """A pattern that cannot be read, or that selects nothing.

    Attributes:
        index: Its place in the list of patterns.
    """

    def __init__(self, index: int, message: str) -> None:
        super().__init__(message)
        self.index = index


_SEGMENT = re.compile(r"\*\*|[\w*\-]+")
_SLICE = re.compile(r"(?P<before>[^\[\]]*)\[(?P<slice>[^\[\]]*)\](?P<after>.*)")
_BOUNDS = re.compile(r"-?\d+|-?\d*:-?\d*(?::(?:-?[1-9]\d*)?)?")
_DEPTH = re.compile(r"(?P<path>[^@]*)@(?P<end>first|last):(?P<number>\d+)(?P<percent>%?)")

Matcher = Callable[[str], bool]


def matcher(text: str, index: int, tree: ModuleTree) -> Matcher:
    """The predicate of a pattern; a leading `!` does not change it.

    Args:
        text: The pattern.
        index: Its place in the list of patterns, for errors.
        tree: The module tree of the names.

    Raises:
        PatternError: It cannot be read, or names a module, class or depth group that does not exist.
    """
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
        known = sorted({name for classes in tree.classes.values() for name in (classes[0], NORM) if name in classes})
        raise PatternError(index, f"pattern {text!r} matches nothing: no module is a {kind!r}{hint(kind, known)}")
    return lambda name: any(parent in modules for parent in parents(name))


def _depth_matcher(text: str, body: str, index: int, tree: ModuleTree) -> Matcher:
    parts = _DEPTH.fullmatch(body)
    if parts is None:
        raise PatternError(index, f"pattern {text!r} cannot be read: expected module@first:2, @last:1 or @first:50%")
    chosen: list[tuple[Mapping[str, int], range]] = []
    for path in _module_paths(parts["path"], text, index, tree):
        if not (depths := tree.depths(path)):
            continue
        num_groups, number = max(depths.values()) + 1, int(parts["number"])
        # Rounded to whole groups, and up to one for any percentage above 0.
        count = max(min(number, 1), (num_groups * number + 50) // 100) if parts["percent"] else number
        if not 1 <= count <= num_groups or (parts["percent"] and number > 100):
            what = f"{number}{parts['percent']}"
            raise PatternError(index, f"pattern {text!r} asks for {what} of the {num_groups} depth groups of {path!r}")
        chosen.append((depths, range(count) if parts["end"] == "first" else range(num_groups - count, num_groups)))
    if not chosen:
        raise PatternError(index, f"pattern {text!r} matches nothing: no module {parts['path']!r} has parameters")
    return lambda name: any(_depth_of(name, depths) in groups for depths, groups in chosen)


def _depth_of(name: str, depths: Mapping[str, int]) -> int | None:
    """The depth group of a tensor: its own, or that of the nearest module around it if torch does not register it."""
    return next((depths[each] for each in (name, *parents(name)) if each in depths), None)


def _expand_slices(body: str, text: str, index: int, tree: ModuleTree) -> Iterator[str]:
    """The pattern with its slices expanded: one path for each selected child."""
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
    """The children that an empty slice could have selected."""
    before = body.partition("[")[0]
    paths = _module_paths(before, text, index, tree)
    if not paths:
        return f": there is no module {before!r}"
    children = tree.children[paths[0]]
    return f" ({paths[0] or 'the model'!r} has {len(children)} children: {', '.join(children[:12])})"


def _module_paths(pattern: str, text: str, index: int, tree: ModuleTree) -> list[str]:
    """The modules whose full path a pattern of names and globs matches; "" is the root."""
    if not pattern:
        return [""]
    expression = _path_expression(pattern, text, index)
    return [path for path in tree.children if path and (found := expression.match(path)) and found.end() == len(path)]


def _path_expression(body: str, text: str, index: int) -> re.Pattern[str]:
    """The regular expression of a dotted pattern, to be matched from the start of a name."""
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
