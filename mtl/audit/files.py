"""Tensors out of anyone's checkpoint files; nothing in a file is ever run."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mtl.audit.dcp import METADATA, file_inside, read_dcp
from mtl.audit.shards import FROZEN, MODEL, Shards
from mtl.names import INNER_NAMES
from mtl.tensor_file import TensorFileError, read_tensor_file

# What wrappers put before names (DataParallel and the like), or anywhere in them (torch.compile, FSDP, checkpointing).
_WRAPPERS = re.compile(rf"^(?:module\.)+|(?:{'|'.join(INNER_NAMES)})\.")
# Under these keys, training scripts put the weights beside other things.
_WEIGHTS = ("state_dict", "model", "model_state_dict", "module")
# What a folder may hold, the first that there is: whole, in shards with an index, or in chunks.
_MODEL = "model.safetensors"
_INDEX = ".index.json"
_IN_FOLDERS = (
    _MODEL,
    f"{_MODEL}{_INDEX}",
    METADATA,
    "pytorch_model.bin",
    f"pytorch_model.bin{_INDEX}",
)
_STATE = "state.json"
# Beside the model's file in a folder that `mtl` wrote: the tensors that were frozen.
_FROZEN = "frozen.safetensors"


class UnreadableError(ValueError):
    """A file that holds no tensors, or not all that it should hold."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, without the prefixes of wrappers.

    Args:
        path: A `.safetensors` file; a file of `torch.save`, read with `weights_only`; or a folder with one
            `model.safetensors`, and a `frozen.safetensors` beside it where a run of `mtl` wrote it, with shards and
            their index, as Hugging Face writes them, with the chunks of `torch.distributed.checkpoint`, or with the
            shards that the processes of a run of `mtl` wrote.

    Raises:
        UnreadableError: There is no such file, it is damaged, holds code, or holds no tensors by name; or two of its
            names are one without the prefixes.
    """
    if is_in_shards(path):
        return read_shards(path)
    main = _main_file(path)
    frozen = main.with_name(_FROZEN)
    tensors: dict[str, Tensor] = {}
    for file in [main, *([frozen] if path.is_dir() and main.name == _MODEL and frozen.is_file() else [])]:
        try:
            content = _content(file)
        except TensorFileError as error:
            raise UnreadableError(f"{file}: cannot be read: {error}") from error
        for name, tensor in _named(content):
            plain = _WRAPPERS.sub("", _WRAPPERS.sub("", name))
            if plain in tensors:
                raise UnreadableError(f"{file}: two tensors are named {plain} without the prefixes of wrappers")
            tensors[plain] = tensor
    if not tensors:
        raise UnreadableError(f"{main}: holds no tensors by name")
    return tensors


def is_in_shards(path: Path) -> bool:
    """Whether a folder is a checkpoint of `mtl` of which each process wrote its part."""
    return (path / MODEL).is_dir() and (path / _STATE).is_file()


def read_shards(folder: Path, kinds: Collection[str] = (MODEL, FROZEN)) -> dict[str, Tensor]:
    """The whole tensors of a checkpoint for which `is_in_shards` holds: of its model, or of other folders of it.

    Raises:
        UnreadableError: It is damaged.
    """
    try:
        return dict(Shards(folder, json.loads((folder / _STATE).read_text(encoding="utf-8")), kinds))
    except TensorFileError as error:
        raise UnreadableError(f"{folder}: cannot be read: {error}") from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UnreadableError(f"{folder / _STATE}: cannot be read: {error!r}") from error


def _main_file(path: Path) -> Path:
    """The file to begin with."""
    if not path.is_dir():
        if not path.is_file():
            raise UnreadableError(f"{path}: no such checkpoint")
        return path
    found = next((path / name for name in _IN_FOLDERS if (path / name).is_file()), None)
    if found is None:
        raise UnreadableError(f"{path}: no such checkpoint (a folder with none of {', '.join(_IN_FOLDERS)})")
    return found


def _content(file: Path) -> Any:
    if file.name == METADATA:
        return read_dcp(file.parent, _WEIGHTS)
    return _read_shards(file) if file.name.endswith(_INDEX) else read_tensor_file(file)


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of all files that an index names; each file has to hold those that the index says, and no others."""
    try:
        placed = json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise TensorFileError("it is no index with a weight_map") from error
    expected: dict[Path, set[str]] = {}
    for name, shard in placed:
        expected.setdefault(file_inside(index.parent, shard), set()).add(name)
    tensors: dict[str, Tensor] = {}
    for file, names in expected.items():
        try:
            content = read_tensor_file(file)
        except TensorFileError as error:
            raise TensorFileError(f"{file.name}: {error}") from error
        if not isinstance(content, Mapping):
            raise TensorFileError(f"{file.name}: holds no tensors by name")
        held = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        for name in sorted(names ^ held.keys()):
            raise TensorFileError(f"{file.name}: {'lacks' if name in names else 'holds, and the index not,'} {name}")
        tensors |= held
    return tensors


def _named(content: Any) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(content, Mapping):
        return
    inner = next((content[key] for key in _WEIGHTS if isinstance(content.get(key), Mapping)), None)
    for name, value in (content if inner is None else inner).items():
        if isinstance(value, Tensor):
            yield str(name), value
