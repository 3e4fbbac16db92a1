"""YAML files as plain data that remembers, for every key, the file and line it was written on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

KeyPath = tuple[int | str, ...]
BASE_KEY = "_base_"


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
    """

    data: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, str] = field(default_factory=dict)

    def where(self, path: KeyPath) -> str:
        """The place of a key, or of the nearest key around it that was written down."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return "defaults"


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: `1e-3` is a number, and `on`, `off`, `yes`, `no` are words."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _expression, _first in [
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
]:
    for _character in [*_first.replace("\0", ""), *([""] if "\0" in _first else [])]:
        _Loader.yaml_implicit_resolvers.setdefault(_character, []).append(
            (f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_expression})$"))
        )


def read_source(file: Path, overrides: Sequence[str] = ()) -> Source:
    """Reads a YAML file, the files it is based on, and the overrides on top.

    Raises:
        ConfigError: A file is missing, is no YAML, has a key twice, or is based on itself; an override cannot be read.
    """
    source = _read_file(file, ())
    for override in overrides:
        _override(source, override)
    return source


def _read_file(file: Path, inside: tuple[Path, ...]) -> Source:
    if file.resolve() in inside:
        raise ConfigError([f"{file}: {BASE_KEY}: the file is based on itself"])
    try:
        node = yaml.compose(file.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise ConfigError([f"{file}: no such file{_near_files(file)}"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{file}: cannot be read: {error}"]) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError([f"{file}{line}: not valid YAML: {getattr(error, 'problem', None) or error}"]) from None
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(
            [f"{file}:1: expected keys and values, got {'nothing' if node is None else 'something else'}"]
        )
    own = Source(places={(): f"{file}:1"})
    own.data = _read_node(node, (), str(file), own)
    bases = own.data.pop(BASE_KEY, [])
    result = Source(places={(): f"{file}:1"})
    for base in [bases] if isinstance(bases, str) else bases:
        if not isinstance(base, str):
            raise ConfigError(
                [f"{own.where((BASE_KEY,))}: {BASE_KEY}: expected a file or a list of files, got {base!r}"]
            )
        _merge(result, _read_file(file.parent / base, (*inside, file.resolve())))
    _merge(result, own)
    return result


def _near_files(file: Path) -> str:
    folder = file.parent if file.parent.is_dir() else Path("configs")
    there = sorted(str(other) for other in folder.glob("*.yaml")) if folder.is_dir() else []
    return f"; there are: {', '.join(there)}" if there else ""


def _read_node(node: yaml.Node, path: KeyPath, file: str, source: Source) -> Any:
    """A YAML node as plain data; the place of everything below it is noted on the way."""
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = f"{file}:{key_node.start_mark.line + 1}"
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError([f"{place}: expected a plain key"])
            if key in result:
                raise ConfigError([f"{place}: {'.'.join(map(str, (*path, key)))}: this key is given twice"])
            source.places[(*path, key)] = place
            result[key] = _read_node(value_node, (*path, key), file, source)
        return result
    if isinstance(node, yaml.SequenceNode):
        items = []
        for index, item in enumerate(node.value):
            source.places[(*path, index)] = f"{file}:{item.start_mark.line + 1}"
            items.append(_read_node(item, (*path, index), file, source))
        return items
    try:
        return _Loader("").construct_object(node)
    except yaml.YAMLError as error:
        raise ConfigError([f"{file}:{node.start_mark.line + 1}: {getattr(error, 'problem', error)}"]) from None


def _merge(below: Source, above: Source) -> None:
    """Lays one source over another: mappings are merged key by key, everything else is replaced whole."""

    def lay(under: dict[str, Any], over: dict[str, Any], path: KeyPath) -> None:
        for key, value in over.items():
            here = (*path, key)
            if isinstance(value, dict) and isinstance(under.get(key), dict):
                lay(under[key], value, here)
            else:
                for place in [place for place in below.places if place[: len(here)] == here]:
                    del below.places[place]
                under[key] = value
                below.places.update({p: where for p, where in above.places.items() if p[: len(here)] == here})

    lay(below.data, above.data, ())


def _override(source: Source, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key or not all(key.split(".")):
        raise ConfigError([f"command line: {override!r}: expected key=value, such as optim.lr=3e-4"])
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise ConfigError([f"command line: {override!r}: the value is not valid YAML"]) from None
    target: Any = source.data
    path: list[int | str] = []
    *parents, last = key.split(".")
    for segment in parents:
        step = _step(target, segment, override)
        target = target.setdefault(step, {}) if isinstance(target, dict) else target[step]
        path.append(step)
    step = _step(target, last, override)
    target[step] = value
    path.append(step)
    for place in [place for place in source.places if place[: len(path)] == tuple(path)]:
        del source.places[place]
    source.places[tuple(path)] = "command line"


def _step(target: Any, segment: str, override: str) -> int | str:
    """The key or index that a segment of an override names; an item of a list may be named by its `name`."""
    if isinstance(target, dict):
        return segment
    if isinstance(target, list):
        names = [item.get("name") if isinstance(item, dict) else None for item in target]
        if segment in names:
            return names.index(segment)
        if segment.isdigit() and int(segment) < len(target):
            return int(segment)
        choices = [str(name) for name in names if name] + [f"0 to {len(target) - 1}"]
        raise ConfigError([f"command line: {override!r}: {segment!r} is none of {', '.join(choices)}"])
    raise ConfigError([f"command line: {override!r}: there is nothing below {segment!r}'s parent"])
