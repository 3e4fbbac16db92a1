"""YAML files as plain data, with the file and line on which every key was written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mtl.config.errors import ConfigError
from mtl.config.examples import examples, file_of
from mtl.config.yaml_text import LIST, MAPPING, NULL, compose, read_scalar
from mtl.runtime.files import dead_link

KeyPath = tuple[int | str, ...]
COMMAND_LINE = "command line"
# A phase with a longer name is shown by its number.
_LONGEST_NAME = 80
BASE_KEY = "_base_"

# Keys that only hold anchors, for `<<` and aliases elsewhere in the file.
_ANCHORS = "x-"
# No configuration is longer, and some files (devices, pipes) never end.
_MOST_CHARACTERS = 10_000_000


@dataclass
class ConfigSource:
    """A configuration as read.

    Attributes:
        data: Nested dicts and lists.
        places: Where each key path was written: "file:line", or "command line".
        names: Names of phases, by key path.
        nulls: Keys with an explicit `null`, which removes the value of a base file.
    """

    data: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, str] = field(default_factory=dict)
    names: dict[KeyPath, str | None] = field(default_factory=dict)
    nulls: set[KeyPath] = field(default_factory=set)

    @property
    def file(self) -> Path | None:
        """The file; None if there is none."""
        place = self.places.get(())
        return None if place is None else Path(place.rpartition(":")[0])

    def where(self, path: KeyPath) -> str:
        """The place of a key, or of the nearest key around it that was written."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return "defaults"

    def overridden_below(self, path: KeyPath) -> KeyPath:
        """The shallowest key below another one that the command line sets; that one itself if there is none."""
        below = (each for each, where in self.places.items() if where == COMMAND_LINE and each[: len(path)] == path)
        return min(below, key=len, default=path)


def read_source(file: Path, overrides: Sequence[str] = ()) -> ConfigSource:
    """Reads a YAML file and the files it is based on, and applies the overrides.

    Raises:
        ConfigError: A file is missing, is no YAML, has a key twice, or is based on itself; an override cannot be read.
    """
    source = _read_file(file, ())
    for override in overrides:
        apply_override(source, override)
    return source


def replace_below(source: ConfigSource, other: ConfigSource, path: KeyPath) -> None:
    """Puts what another source has under a key in the place of what is there; nothing if it has none."""

    def below(places: dict[KeyPath, Any]) -> dict[KeyPath, Any]:
        return {each: place for each, place in places.items() if each[: len(path)] == path}

    for each in below(source.places):
        del source.places[each]
    source.places |= below(other.places)
    around: Any = source.data
    others: Any = other.data
    for key in path[:-1]:
        around, others = around[key], others.get(key) or {}
    around.pop(path[-1], None)
    if path[-1] in others:
        around[path[-1]] = others[path[-1]]


def _read_file(file: Path, inside: tuple[Path, ...], wanted_by: str = "") -> ConfigSource:
    text = _read_text(file, wanted_by)
    if file.resolve() in inside:
        raise ConfigError([f"{wanted_by}{file} is based on itself"])
    node = compose(text, lambda line: f"{file}:{line}")
    if not isinstance(node, yaml.MappingNode):
        got = "nothing" if node is None else "something else"
        raise ConfigError([f"{file}:1: expected keys and values, got {got}"])
    own = ConfigSource(places={(): f"{file}:1"})
    own.data = _read_node(node, (), own, lambda line: f"{file}:{line}")
    for key in [key for key in own.data if key.startswith(_ANCHORS)]:
        del own.data[key]
    bases = own.data.pop(BASE_KEY, [])
    result = ConfigSource(places={(): f"{file}:1"})
    for base in bases if isinstance(bases, list) else [bases]:
        place = own.where((BASE_KEY,))
        if not isinstance(base, str):
            raise ConfigError([f"{place}: {BASE_KEY}: expected a file or a list of files, got {base!r}"])
        merge_sources(
            result, _read_file(file_of(base, file.parent), (*inside, file.resolve()), f"{place}: {BASE_KEY}: ")
        )
    merge_sources(result, own)
    return result


def _read_text(file: Path, wanted_by: str) -> str:
    try:
        with file.open(encoding="utf-8") as stream:
            text = stream.read(_MOST_CHARACTERS + 1)
    except FileNotFoundError:
        why = dead_link(file) or _near_files(file)
        raise ConfigError([f"{wanted_by}{file}: no such file{why}"]) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError([f"{wanted_by}{file}: cannot be read: {reason}"]) from None
    if len(text) > _MOST_CHARACTERS:
        raise ConfigError([f"{wanted_by}{file}: more than {_MOST_CHARACTERS:,} characters, which no configuration has"])
    return text


def _near_files(file: Path) -> str:
    folder = file.parent if file.parent.is_dir() else Path("configs")
    there = sorted(str(other) for other in folder.glob("*.yaml")) if folder.is_dir() else []
    if not there and not file.suffix:
        there = [*examples()]
    return f"; there are: {', '.join(there)}" if there else ""


def _read_node(
    node: yaml.Node,
    path: KeyPath,
    source: ConfigSource,
    place: Callable[[int], str],
    around: tuple[yaml.Node, ...] = (),
) -> Any:
    """A YAML node as plain data; records the place of every key below it in `source`."""
    here = place(node.start_mark.line + 1)
    if node in around:
        raise ConfigError([f"{here}: {dotted(path, source.names.get)}: the value contains itself"])
    if isinstance(node, yaml.MappingNode) and node.tag == MAPPING:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            where = place(key_node.start_mark.line + 1)
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError([f"{where}: expected a plain key"])
            key = key_node.value
            if key in result:
                twice = dotted((*path, key), source.names.get)
                raise ConfigError([f"{where}: {twice}: this key is given twice"])
            source.places[(*path, key)] = where
            result[key] = _read_node(value_node, (*path, key), source, place, (*around, node))
        return result
    if isinstance(node, yaml.SequenceNode) and node.tag == LIST:
        items = []
        for index, item in enumerate(node.value):
            source.places[(*path, index)] = place(item.start_mark.line + 1)
            if isinstance(item, yaml.MappingNode):
                source.names[(*path, index)] = phase_name({str(key.value): each.value for key, each in item.value})
            items.append(_read_node(item, (*path, index), source, place, (*around, node)))
        return items
    if node.tag == NULL and node.value:
        source.nulls.add(path)
    return read_scalar(node, f"{here}: {dotted(path, source.names.get)}")


def dotted(path: KeyPath, name_at: Callable[[KeyPath], str | None] = lambda _: None) -> str:
    """A key as it is written on the command line: `phases.warm.freeze`, also where that phase is inside a repeat.

    Args:
        path: The key path.
        name_at: The name of the phase at a place in `phases`; None if there is none.
    """
    segments: list[str] = []
    for end, key in enumerate(path, 1):
        name = name_at(path[:end]) if path[0] == "phases" and isinstance(key, int) else None
        # Names are unique among all phases: the name alone finds a phase inside a repeat.
        segments = [*segments, str(key)] if name is None else ["phases", name]
    return ".".join(segments) or "the configuration"


def phase_name(entry: Any) -> str | None:
    """The name of an entry of `phases`; None for a repeat, and for a name that cannot be part of a readable key."""
    if not isinstance(entry, dict) or entry.keys() & {"repeat", "phases"}:
        return None
    name = entry.get("name")
    if not isinstance(name, str) or not 0 < len(name) <= _LONGEST_NAME or not name.isprintable():
        return None
    return name if ":" not in name else None


def merge_sources(below: ConfigSource, above: ConfigSource) -> None:
    """Merges `above` into `below`: mappings key by key; other values replace the one below, and `null` removes it."""

    def merge(under: dict[str, Any], over: dict[str, Any], path: KeyPath) -> None:
        for key, value in over.items():
            here = (*path, key)
            if isinstance(value, dict) and isinstance(under.get(key), dict):
                merge(under[key], value, here)
            else:
                for place in [place for place in below.places if place[: len(here)] == here]:
                    del below.places[place]
                if here in above.nulls and under.get(key) is not None:
                    del under[key]
                    continue
                under[key] = value
                below.places.update({p: where for p, where in above.places.items() if p[: len(here)] == here})

    merge(below.data, above.data, ())


def apply_override(source: ConfigSource, override: str) -> None:
    """Applies a dotted `key=value` pair.

    Raises:
        ConfigError: It cannot be read, or there is no such place.
    """
    key, equals, text = override.partition("=")
    if BASE_KEY in key.split("."):
        raise ConfigError(
            [f"command line: {override!r}: only a file can have bases; write at its top: {BASE_KEY}: [FILE, ...]"]
        )
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
                source.places[tuple(path)] = COMMAND_LINE
            target = target[step]
    *around, step = _steps(target, last, override)
    for each in around:
        target = target[each]
    path += [*around, step]
    for place in [place for place in source.places if place[: len(path)] == tuple(path)]:
        del source.places[place]
    source.nulls.discard(tuple(path))
    node = compose(text, lambda _: f"command line: {override!r}")
    value = None if node is None else _read_node(node, tuple(path), source, lambda _: COMMAND_LINE)
    if tuple(path) in source.nulls and isinstance(target, dict) and target.get(last) is not None:
        del target[last]
        return
    source.places[tuple(path)] = COMMAND_LINE
    target[step] = value


def _steps(target: Any, segment: str, override: str) -> list[int | str]:
    """The keys and indices that a segment of an override names.

    An item of a list may be named by its `name`, and so may items of lists inside it (phases inside a repeat).
    """
    if isinstance(target, dict):
        return [segment]
    if isinstance(target, list):
        names = dict(_item_names(target, []))
        if segment in names:
            return names[segment]
        if segment.isdigit() and int(segment) < len(target):
            return [int(segment)]
        choices = ", ".join([*names] + ([f"0 to {len(target) - 1}"] if target else []))
        raise ConfigError(
            [f"command line: {override!r}: {segment!r} is none of {choices or 'nothing: the list is empty'}"]
        )
    raise ConfigError([f"command line: {override!r}: there is nothing below {segment!r}'s parent"])


def _item_names(items: list[Any], path: list[int | str]) -> Iterator[tuple[str, list[int | str]]]:
    """The names of a list's items, and of items of lists inside them, each with its key path."""
    for index, item in enumerate(items):
        if isinstance(item, dict) and isinstance(item.get("name"), str):
            yield item["name"], [*path, index]
        elif isinstance(item, dict):
            for key, value in item.items():
                if isinstance(value, list):
                    yield from _item_names(value, [*path, index, key])
