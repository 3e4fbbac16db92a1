"""All that a checkpoint holds, by name: the weights under their own names, every other tensor under its dotted path."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

from mtl.checkpoint.tensor_file.plain_data import StandIn, array, attributes, is_plain
from mtl.runtime.text import INNER_NAMES, with_article

# Under these keys training scripts put the weights next to other things; the first that holds tensors is taken.
WEIGHTS = ("state_dict", "model", "model_state_dict", "module", "state_dict_ema", "model_ema")

_INNER = "|".join(INNER_NAMES)
# What wrappers put before names (DataParallel and the like), or anywhere in them (torch.compile, FSDP, checkpointing).
_WRAPPERS = re.compile(rf"^(?:(?:module|{_INNER})\.)+(?=.)|(?<=\.)(?:(?:{_INNER})\.)+(?=.)")

# The keys and indices on the way to a value.
KeyPath = tuple[object, ...]


@dataclass(frozen=True)
class LeftOut:
    """Something that was not read as tensors.

    Attributes:
        reason: What it is, or why it was not read.
        file: The file that it is, if it is one.
    """

    reason: str
    file: Path | None = None


@dataclass
class Leaves:
    """The content of a checkpoint, by path, as it is read.

    Attributes:
        found: Tensors, and what was not read as tensors.
        num_plain: Numbers, text and the like.
    """

    found: list[tuple[KeyPath, Tensor | LeftOut]] = field(default_factory=list)
    num_plain: int = 0

    def add(self, content: object, path: KeyPath = ()) -> None:
        """Adds all that is in some content, at any depth."""
        # A stack, since a file may be nested deeper than Python calls; the identities of all around end a circle.
        stack: list[tuple[KeyPath, object, frozenset[int]]] = [(path, content, frozenset())]
        while stack:
            here, value, around = stack.pop()
            if isinstance(value, StandIn) and (tensor := array(value)) is not None:
                value = tensor
            inner = _inside(value)
            if id(value) in around:
                self.found.append((here, LeftOut("it contains itself")))
                continue
            if isinstance(value, Tensor):
                self.found.append((here, value if _is_comparable(value) else LeftOut(_kind_of(value))))
            elif inner is None and is_plain(value):
                self.num_plain += 1
            elif inner is None:
                self.found.append((here, LeftOut(_kind_of(value))))
            below = around | {id(value)}
            stack += reversed([((*here, key), each, below) for key, each in inner or ()])

    def leave_out(self, path: KeyPath, reason: str, file: Path | None = None) -> None:
        self.found.append((path, LeftOut(reason, file)))


@dataclass(frozen=True)
class Contents:
    """All that a checkpoint holds, by name.

    Attributes:
        weights: What was taken as the weights, without the keys that they lie under.
        rest: Everything else, by dotted path.
        taken: The dotted key of the weights; empty if they are not under a key of their own.
        passed_over: Other keys under which weights may lie; what they hold is in `rest`.
        num_plain: Numbers, text and the like, which are no tensors.
    """

    weights: dict[str, Tensor | LeftOut]
    rest: dict[str, Tensor | LeftOut]
    taken: str
    passed_over: tuple[str, ...]
    num_plain: int

    @property
    def everything(self) -> dict[str, Tensor | LeftOut]:
        return self.weights | self.rest

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the weights."""
        return {name: each for name, each in self.weights.items() if isinstance(each, Tensor)}

    def __str__(self) -> str:
        """Which dictionary was taken; empty if there was nothing to choose."""
        if not self.taken:
            return ""
        others = f", not those under {', '.join(self.passed_over)}" if self.passed_over else ""
        return f"the weights are those under {self.taken}{others}"


def named(leaves: Leaves) -> Contents:
    """Gives every leaf of a checkpoint a name of its own.

    A name is the path joined by dots, without prefixes of wrappers. Where that would give two leaves one name, or a key
    is not text that can stand in a name, it is written as in Python: `["a.b"]`, `["a"]["b"]`.
    """
    tensor_paths = [path for path, value in leaves.found if isinstance(value, Tensor)]
    at = _weights_at(tensor_paths)
    is_weight = [path[: len(at)] == at for path, _ in leaves.found]
    names = _names([path for path, _ in leaves.found], at, is_weight)
    parts = list(zip(names, (value for _, value in leaves.found), is_weight, strict=True))
    siblings = {
        path[len(at) - 1] for path in tensor_paths if at and path[: len(at) - 1] == at[:-1] and len(path) > len(at)
    }
    return Contents(
        {name: value for name, value, is_one in parts if is_one},
        {name: value for name, value, is_one in parts if not is_one},
        ".".join(map(str, at)),
        tuple(key for key in WEIGHTS if key in siblings and key != at[-1]),
        leaves.num_plain,
    )


def _weights_at(paths: Sequence[KeyPath], depth: int = 4) -> KeyPath:
    """The path of the weights among those of all tensors; empty if no key marks only some of them as weights.

    The key may itself be under one key that all share: `{"app": {"model": ..., "optim": ...}}`, as torch teaches it.
    """
    for key in WEIGHTS:
        inner = [path[1:] for path in paths if len(path) > 1 and path[0] == key]
        if inner:
            is_deeper = depth and not any(len(path) == 1 for path in inner)
            return (key, *(_weights_at(inner, depth - 1) if is_deeper else ()))
    if depth and len({path[0] for path in paths if path}) == 1 and all(len(path) > 1 for path in paths):
        below = _weights_at([path[1:] for path in paths], depth - 1)
        return (paths[0][0], *below) if below else ()
    return ()


def _names(paths: Sequence[KeyPath], at: KeyPath, is_weight: Sequence[bool]) -> list[str]:
    """One name for each path, no two alike."""
    short = [_dotted(path[len(at) :] if is_one else path) for path, is_one in zip(paths, is_weight, strict=True)]
    often = Counter(short)
    names = [name if often[name] == 1 else _subscripts(path) for name, path in zip(short, paths, strict=True)]
    # Keys that are not equal may look so, such as two that are not a number.
    used: Counter[str] = Counter()
    for place, name in enumerate(names):
        used[name] += 1
        names[place] = name if used[name] == 1 else f"{name}#{used[name]}"
    return names


def _dotted(path: KeyPath) -> str:
    if not path:
        return "tensor"
    parts = [_WRAPPERS.sub("", key) if isinstance(key, str) else key for key in path]
    return ".".join(str(part) if _is_short(part) else f"[{_literal(part)}]" for part in parts)


def _is_short(key: object) -> bool:
    """Whether a key can stand in a dotted name as it is."""
    if isinstance(key, str):
        return bool(key.strip()) and key.isprintable() and not set("[]#") & set(key)
    return isinstance(key, int) and not isinstance(key, bool)


def _subscripts(path: KeyPath) -> str:
    return "".join(f"[{_literal(key)}]" for key in path)


def _literal(key: object) -> str:
    return json.dumps(key) if isinstance(key, str) else ascii(key)


def _inside(value: object) -> list[tuple[object, object]] | None:
    """The items of a container, by key; None if the object is not a container."""
    if isinstance(value, Mapping):
        found = [*_items(value.items())]
        # A module's `state_dict` is a dictionary with versions of classes as an attribute.
        return found + [(key, each) for key, each in _attributes(value) if key != "_metadata"]
    if isinstance(value, torch.Size):
        return None
    if isinstance(value, list | tuple):
        return list(enumerate(value))
    if isinstance(value, Tensor):
        # Attributes that were set on it.
        return _attributes(value)
    if isinstance(value, StandIn) and (own := attributes(value)) is not None:
        return [*_items(own.items())]
    return None


def _items(items: Iterable[tuple[object, object]]) -> Iterator[tuple[object, object]]:
    for number, (key, value) in enumerate(items):
        if is_plain(key) or (isinstance(key, tuple) and all(map(is_plain, key))):
            yield key, value
        else:
            # A key may be a tensor, or hold one.
            yield f"<key {number}>", key
            yield f"<value {number}>", value


def _attributes(value: object) -> list[tuple[object, object]]:
    return list(getattr(value, "__dict__", {}).items())


def _is_comparable(tensor: Tensor) -> bool:
    """Whether a tensor has bytes of its own that can be compared, dense or sparse."""
    is_usual = type(tensor) in (Tensor, Parameter)
    return is_usual and not (tensor.is_quantized or tensor.is_nested or tensor.is_meta)


def _kind_of(value: object) -> str:
    """The kind of an object, in words."""
    if isinstance(value, Tensor):
        kinds = {"quantized": value.is_quantized, "nested": value.is_nested, "meta": value.is_meta}
        kind = next((kind for kind, holds in kinds.items() if holds), None)
        return f"a {kind} tensor" if kind else f"a {type(value).__name__}, not a plain tensor"
    kind = value.kind if isinstance(value, StandIn) else f"{type(value).__module__}.{type(value).__qualname__}"
    return with_article(kind.removeprefix("builtins."))
