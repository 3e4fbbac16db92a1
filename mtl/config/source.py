"""YAML files as plain data that remembers, for every key, the file and line it was written on."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

KeyPath = tuple[int | str, ...]
BASE_KEY = "_base_"

_QUOTE = 'a value that starts with ! must be in quotes: "!pattern"'


class ConfigError(ValueError):
    """Mistakes in a configuration, one line each."""

    def __init__(self, mistakes: Sequence[str]) -> None:
        super().__init__("\n".join(mistakes))
        self.mistakes = list(mistakes)


@dataclass
class Source:
    """A configuration as read.

    Attributes:
        data: Nested dicts and lists.
        places: Where each key path was written: "file:line", or "command line".
        names: Names of phases, by the place where each was read.
        nulls: Keys of which `null` was written in words: they take back what is below, and have nothing else to say.
    """

    data: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, str] = field(default_factory=dict)
    names: dict[KeyPath, str | None] = field(default_factory=dict)
    nulls: set[KeyPath] = field(default_factory=set)

    def where(self, path: KeyPath) -> str:
        """The place of a key, or of the nearest key around it that was written down."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return "defaults"


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: `1e-3` is a number, `010` is ten, and `on`, `off`, `yes`, `no` are words."""


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads: text that looks like a number to it is quoted, and nothing is abbreviated."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - PyYAML's signature
        return True


_NULL, _BOOL, _INT, _FLOAT, _TEXT, _LIST, _MAPPING = (
    f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")
)
_SCALARS = [
    (_NULL, r"~|null|Null|NULL|", "~nN"),
    (_BOOL, r"true|True|TRUE|false|False|FALSE", "tTfF"),
    (_INT, r"[-+]?[0-9]+", "-+0123456789"),
    (
        _FLOAT,
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
]
_RESOLVERS: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
for _tag, _expression, _first in _SCALARS:
    # PyYAML looks resolvers up by the first character; empty text, which is null, by none.
    for _character in [*_first, *([""] if _tag == _NULL else [])]:
        _RESOLVERS.setdefault(_character, []).append((_tag, re.compile(f"^(?:{_expression})$")))
_Loader.yaml_implicit_resolvers = _RESOLVERS
_Dumper.yaml_implicit_resolvers = _RESOLVERS


def dump_yaml(data: Any) -> str:
    """Writes plain data as YAML that `read_source` reads back as the same data."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def read_source(file: Path, overrides: Sequence[str] = ()) -> Source:
    """Reads a YAML file, the files it is based on, and the overrides on top.

    Raises:
        ConfigError: A file is missing, is no YAML, has a key twice, or is based on itself; an override cannot be read.
    """
    source = _read_file(file, ())
    for override in overrides:
        _override(source, override)
    return source


def _read_file(file: Path, inside: tuple[Path, ...], wanted_by: str = "") -> Source:
    if file.resolve() in inside:
        raise ConfigError([f"{wanted_by}{file} is based on itself"])
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError([f"{wanted_by}{file}: no such file{_near_files(file)}"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{wanted_by}{file}: cannot be read: {error}"]) from None
    node = _compose(text, lambda line: f"{file}:{line}")
    if not isinstance(node, yaml.MappingNode):
        came = "nothing" if node is None else "something else"
        raise ConfigError([f"{file}:1: expected keys and values, got {came}"])
    own = Source(places={(): f"{file}:1"})
    own.data = _read_node(node, (), own, lambda line: f"{file}:{line}")
    bases = own.data.pop(BASE_KEY, [])
    result = Source(places={(): f"{file}:1"})
    for base in bases if isinstance(bases, list) else [bases]:
        place = own.where((BASE_KEY,))
        if not isinstance(base, str):
            raise ConfigError([f"{place}: {BASE_KEY}: expected a file or a list of files, got {base!r}"])
        _merge(result, _read_file(file.parent / base, (*inside, file.resolve()), f"{place}: {BASE_KEY}: "))
    _merge(result, own)
    return result


def _near_files(file: Path) -> str:
    folder = file.parent if file.parent.is_dir() else Path("configs")
    there = sorted(str(other) for other in folder.glob("*.yaml")) if folder.is_dir() else []
    return f"; there are: {', '.join(there)}" if there else ""


def _compose(text: str, place: Callable[[int], str]) -> yaml.Node | None:
    """Parses YAML to its node tree; `place` names a line."""
    try:
        node: yaml.Node | None = yaml.compose(text, Loader=_Loader)
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise ConfigError([f"{place(line)}: not valid YAML: the character {chr(error.character)!r}"]) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        hint = f"; {_QUOTE}" if re.search(r"(^|[\s\[,])![^\s\"']", text) else ""
        raise ConfigError([f"{place(mark.line + 1 if mark else 1)}: not valid YAML: {problem}{hint}"]) from None
    return node


def _read_node(
    node: yaml.Node, path: KeyPath, source: Source, place: Callable[[int], str], around: tuple[yaml.Node, ...] = ()
) -> Any:
    """A YAML node as plain data; the place of everything below it is noted in `source` on the way."""
    here = place(node.start_mark.line + 1)
    if node in around:
        raise ConfigError([f"{here}: {dotted(path, source.names.get)}: the value contains itself"])
    if isinstance(node, yaml.MappingNode) and node.tag == _MAPPING:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            where = place(key_node.start_mark.line + 1)
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError([f"{where}: expected a plain key"])
            key = key_node.value
            if key in result:
                told = dotted((*path, key), source.names.get)
                raise ConfigError([f"{where}: {told}: this key is given twice"])
            source.places[(*path, key)] = where
            result[key] = _read_node(value_node, (*path, key), source, place, (*around, node))
        return result
    if isinstance(node, yaml.SequenceNode) and node.tag == _LIST:
        items = []
        for index, item in enumerate(node.value):
            source.places[(*path, index)] = place(item.start_mark.line + 1)
            if isinstance(item, yaml.MappingNode):
                source.names[(*path, index)] = phase_name({str(key.value): each.value for key, each in item.value})
            items.append(_read_node(item, (*path, index), source, place, (*around, node)))
        return items
    if node.tag == _NULL and node.value:
        source.nulls.add(path)
    return _read_scalar(node, f"{here}: {dotted(path, source.names.get)}")


def _read_scalar(node: yaml.Node, where: str) -> Any:
    text = node.value
    try:
        if isinstance(text, str) and node.tag in (_NULL, _BOOL, _INT, _FLOAT, _TEXT):
            if node.tag == _FLOAT:
                return float(text.replace(".inf", "inf").replace(".nan", "nan") if text[-1:].isalpha() else text)
            return {_NULL: lambda: None, _BOOL: lambda: text.lower() == "true", _INT: lambda: int(text)}.get(
                node.tag, lambda: text
            )()
    except ValueError:
        pass
    quoted = f"; {_QUOTE}" if node.tag.startswith("!") else ""
    raise ConfigError([f"{where}: cannot be read as {node.tag.removeprefix('tag:yaml.org,2002:')}{quoted}"])


def dotted(path: KeyPath, name_at: Callable[[KeyPath], str | None] = lambda _: None) -> str:
    """A key as it is written on the command line: `phases.warm.freeze`, also where that phase is inside a repeat.

    Args:
        path: The key path.
        name_at: The name of the phase at a place in `phases`; None if there is none.
    """
    segments: list[str] = []
    for end, key in enumerate(path, 1):
        name = name_at(path[:end]) if path[0] == "phases" and isinstance(key, int) else None
        # Names are unique among all phases: one that is inside a repeat is known by its name alone.
        segments = [*segments, str(key)] if name is None else ["phases", name]
    return ".".join(segments) or "the configuration"


def phase_name(entry: Any) -> str | None:
    """The name of an entry of `phases`; None for a repeat, and where there is none that a key can be read with."""
    if not isinstance(entry, dict) or entry.keys() & {"repeat", "phases"}:
        return None
    name = entry.get("name")
    return name if isinstance(name, str) and name and ":" not in name else None


def _merge(below: Source, above: Source) -> None:
    """Lays one source over another: mappings are merged key by key, everything else is replaced whole or taken back."""

    def lay(under: dict[str, Any], over: dict[str, Any], path: KeyPath) -> None:
        for key, value in over.items():
            here = (*path, key)
            if isinstance(value, dict) and isinstance(under.get(key), dict):
                lay(under[key], value, here)
            else:
                for place in [place for place in below.places if place[: len(here)] == here]:
                    del below.places[place]
                if here in above.nulls and under.get(key) is not None:
                    del under[key]
                    continue
                under[key] = value
                below.places.update({p: where for p, where in above.places.items() if p[: len(here)] == here})

    lay(below.data, above.data, ())


def _override(source: Source, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key or not all(key.split(".")):
        raise ConfigError([f"command line: {override!r}: expected key=value, such as optim.lr_scale=0.5"])
    target: Any = source.data
    path: list[int | str] = []
    *parents, last = key.split(".")
    for segment in parents:
        for step in _steps(target, segment, override):
            path.append(step)
            if isinstance(target, dict) and step not in target:
                target[step] = {}
                source.places[tuple(path)] = "command line"
            target = target[step]
    *around, step = _steps(target, last, override)
    for each in around:
        target = target[each]
    path += [*around, step]
    for place in [place for place in source.places if place[: len(path)] == tuple(path)]:
        del source.places[place]
    source.nulls.discard(tuple(path))
    node = _compose(text, lambda _: f"command line: {override!r}")
    value = None if node is None else _read_node(node, tuple(path), source, lambda _: "command line")
    if tuple(path) in source.nulls and isinstance(target, dict) and target.get(last) is not None:
        del target[last]
        return
    source.places[tuple(path)] = "command line"
    target[step] = value


def _steps(target: Any, segment: str, override: str) -> list[int | str]:
    """The keys and indices that a segment of an override names.

    An item of a list may be named by its `name`; the items of lists inside the list's items (phases that are repeated)
    are found by theirs as well.
    """
    if isinstance(target, dict):
        return [segment]
    if isinstance(target, list):
        names = dict(_names(target, []))
        if segment in names:
            return names[segment]
        if segment.isdigit() and int(segment) < len(target):
            return [int(segment)]
        choices = ", ".join([*names] + ([f"0 to {len(target) - 1}"] if target else []))
        raise ConfigError(
            [f"command line: {override!r}: {segment!r} is none of {choices or 'nothing: the list is empty'}"]
        )
    raise ConfigError([f"command line: {override!r}: there is nothing below {segment!r}'s parent"])


def _names(items: list[Any], path: list[int | str]) -> Iterator[tuple[str, list[int | str]]]:
    """The names of a list's items, and of items of lists inside them, with the way to each."""
    for index, item in enumerate(items):
        if isinstance(item, dict) and isinstance(item.get("name"), str):
            yield item["name"], [*path, index]
        elif isinstance(item, dict):
            for key, value in item.items():
                if isinstance(value, list):
                    yield from _names(value, [*path, index, key])
