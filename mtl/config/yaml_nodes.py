"""YAML's tree of nodes before it is read: expands merge keys (`<<`), refuses trees that would grow too large."""

from __future__ import annotations

from collections.abc import Iterable

import yaml

# More than any run needs; aliases of aliases can stand for billions.
MOST_VALUES = 100_000
_MERGE = "<<"


class TreeError(Exception):
    """A tree that is not valid.

    Attributes:
        line: The line of the error, from 0.
    """

    def __init__(self, node: yaml.Node, message: str) -> None:
        super().__init__(message)
        self.line: int = node.start_mark.line


def expand(root: yaml.Node) -> None:
    """Copies the keys that `<<` names into the mapping around it, in place; each keeps the line it was written on.

    As in YAML 1.1: a mapping's own keys override merged ones, and of several merged mappings the first wins.

    Raises:
        TreeError: `<<` does not name mappings, or is given twice; or aliases make the tree too large.
    """
    _expand(root, {}, set())
    if _num_values(root, {}) > MOST_VALUES:
        raise TreeError(root, f"aliases expand to more than {MOST_VALUES:,} values; write fewer")


def _expand(node: yaml.Node, done: dict[int, yaml.Node], around: set[int]) -> None:
    """Expands all nodes below a node, each once; `done` holds them, since an id is only valid while its node lives."""
    if id(node) in done or id(node) in around or isinstance(node, yaml.ScalarNode):
        return  # a node that contains itself is refused when it is read
    around = around | {id(node)}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if _is_merge(key) and any(id(each) in around for each in (value, *_merged_nodes(value))):
                raise TreeError(key, f"{_MERGE}: the value contains itself")
            _expand(value, done, around)
        _merge_in(node)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _expand(item, done, around)
    done[id(node)] = node


def _merge_in(node: yaml.MappingNode) -> None:
    merges = [pair for pair in node.value if _is_merge(pair[0])]
    if not merges:
        return
    if len(merges) > 1:
        raise TreeError(merges[1][0], f"{_MERGE}: this key is given twice; several mappings: {_MERGE}: [*one, *other]")
    ((key, value),) = merges
    named = _merged_nodes(value)
    sources = [each for each in named if isinstance(each, yaml.MappingNode)]
    if not sources or len(sources) < len(named):
        raise TreeError(key, f"{_MERGE}: expected the alias of a mapping, such as *common, or a list of them")
    own = [pair for pair in node.value if pair[0] is not key]
    first_own = {each.value: (each, inside) for each, inside in reversed(own) if isinstance(each, yaml.ScalarNode)}
    merged: dict[str, tuple[yaml.Node, yaml.Node]] = {}
    for source in sources:
        _check_keys(source)
        for each, inside in source.value:
            if isinstance(each, yaml.ScalarNode):
                merged.setdefault(each.value, first_own.get(each.value, (each, inside)))
    used = {id(each) for each, _ in merged.values()}
    node.value = [*merged.values(), *(pair for pair in own if id(pair[0]) not in used)]


def _check_keys(mapping: yaml.MappingNode) -> None:
    """Raises `TreeError` for a key that is given twice, which merging would hide."""
    seen = set()
    for key, _ in mapping.value:
        if isinstance(key, yaml.ScalarNode) and key.value in seen:
            raise TreeError(key, f"{key.value}: this key is given twice")
        seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))


def _is_merge(key: yaml.Node) -> bool:
    """Whether a key is `<<`; in quotes, it is a key like any other."""
    return isinstance(key, yaml.ScalarNode) and key.value == _MERGE and key.style is None


def _merged_nodes(value: yaml.Node) -> list[yaml.Node]:
    return list(value.value) if isinstance(value, yaml.SequenceNode) else [value]


def _num_values(node: yaml.Node, sizes: dict[int, int]) -> int:
    """The number of values in a tree if every alias is a copy; a node inside itself counts as 0."""
    if id(node) not in sizes:
        sizes[id(node)] = 0
        below: Iterable[yaml.Node] = ()
        if isinstance(node, yaml.MappingNode):
            below = (value for _, value in node.value)
        elif isinstance(node, yaml.SequenceNode):
            below = node.value
        sizes[id(node)] = 1 + sum(_num_values(each, sizes) for each in below)
    return sizes[id(node)]
