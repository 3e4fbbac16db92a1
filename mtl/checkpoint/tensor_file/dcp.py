"""The tensors of a folder of `torch.distributed.checkpoint`; nothing in it is ever run.

A pickle, `.metadata`, says which slice of which file holds which box of which tensor. torch's own reader is not used:
it runs the code in that pickle and in every entry that is no tensor, it follows paths out of the folder, and where
chunks leave a gap it does not raise. Here the pickle is read with stand-ins that only keep what was stored.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from mtl.checkpoint.tensor_file.contents import KeyPath, Leaves
from mtl.checkpoint.tensor_file.plain_data import stand_in
from mtl.checkpoint.tensor_file.shards import join_chunks
from mtl.checkpoint.tensor_file.single import TensorFileError, file_inside, load_pickle
from mtl.runtime.console import first_line

METADATA = ".metadata"

# What `.metadata` may name, besides types of elements and torch.Size: its classes, and the path it was written to.
_MODULES = ("torch.distributed.", "pathlib")
# Python 3.11.2, for one, writes a member of an enum as a call of getattr; the stand-in looks nothing up.
_NAMES = ("torch.serialization._get_layout", "builtins.getattr")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if module.startswith(_MODULES) or full_name in _NAMES:
            return stand_in(full_name)
        # Not by getattr, for which torch imports some of its parts.
        found = vars(torch).get(name) if module == "torch" else None
        if found is torch.Size or isinstance(found, torch.dtype):
            return found
        raise TensorFileError(f"it names {full_name}, which the metadata of a checkpoint does not need; not run")


@dataclass(frozen=True)
class _Slice:
    """Where one box of a tensor is, or something else: `length` bytes from `start` in a file."""

    file: Path
    start: int
    length: int


# By the name in the metadata and the offset of the box; others than tensors have no offset.
_Slices = Mapping[tuple[str, torch.Size | None], _Slice]


@dataclass(frozen=True)
class _Tensor:
    """A tensor as the metadata describes it; `boxes` are offsets, sizes, and where it is, None for no elements."""

    name: str
    dtype: torch.dtype
    shape: torch.Size
    boxes: tuple[tuple[torch.Size, torch.Size, _Slice | None], ...]


def read_dcp(folder: Path) -> Leaves:
    """All that a distributed checkpoint holds, each full tensor joined from its chunks.

    Args:
        folder: A folder with `.metadata`.

    Raises:
        TensorFileError: A file is missing, damaged, or holds code in the place of a tensor; the chunks of a tensor
            leave a gap or overlap; or a slice is compressed, or outside the folder.
    """
    try:
        with (folder / METADATA).open("rb") as stream:
            metadata = _Unpickler(stream).load()
    except TensorFileError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise TensorFileError(f"it is no pickle of metadata: {first_line(error)}") from error
    try:
        entries = _entries(folder, metadata.state)
    except TensorFileError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise TensorFileError(f"it is not the metadata of a distributed checkpoint: {first_line(error)}") from error
    leaves = Leaves()
    for path, entry in entries:
        if isinstance(entry, _Tensor):
            leaves.add(_read(entry), path)
            continue
        try:
            leaves.add(_load(entry), path)
        except TensorFileError as error:
            leaves.leave_out(path, str(error))
    return leaves


def _entries(folder: Path, metadata: Mapping[str, Any]) -> list[tuple[KeyPath, _Tensor | _Slice]]:
    """The entries of the metadata, by path: tensors, and other objects, of which each is in one slice."""
    slices: dict[tuple[str, torch.Size | None], _Slice] = {}
    for index, info in metadata["storage_data"].items():
        offset = index.state.get("offset")
        slices[index.state["fqn"], None if offset is None else torch.Size(offset)] = _slice(folder, info.state)
    # How torch has flattened a nested state; without this, nothing was flattened, and a dot is part of a name.
    paths = metadata.get("planner_data") or {}
    entries: list[tuple[KeyPath, _Tensor | _Slice]] = []
    for name, stored in metadata["state_dict_metadata"].items():
        path = paths.get(name, (name,))
        is_path = isinstance(path, tuple) and path and all(isinstance(key, str | int) for key in path)
        if not isinstance(name, str) or not is_path:
            raise TypeError(f"{name!r} is not described as a part of a state")
        is_tensor = not stored.full_name.endswith(".BytesStorageMetadata")
        if not is_tensor and (name, None) not in slices:
            raise TensorFileError(f"{name}: it is in no file")
        entries.append((path, _described(name, stored.state, slices) if is_tensor else slices[name, None]))
    return entries


def _described(name: str, stored: Mapping[str, Any], slices: _Slices) -> _Tensor:
    dtype = stored["properties"].state[0]
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name!r} is not described as a tensor")
    boxes = []
    for chunk in stored["chunks"]:
        offsets, sizes = torch.Size(chunk.state["offsets"]), torch.Size(chunk.state["sizes"])
        # A process whose share of a tensor is empty writes nothing, and several such shares have one offset.
        is_empty = not math.prod(sizes)
        if not is_empty and (name, offsets) not in slices:
            raise TensorFileError(f"{name}: its chunk at {list(offsets)} is in no file")
        boxes.append((offsets, sizes, None if is_empty else slices[name, offsets]))
    return _Tensor(name, dtype, torch.Size(stored["size"]), tuple(boxes))


def _slice(folder: Path, info: Mapping[str, Any]) -> _Slice:
    if info.get("transform_descriptors"):
        raise TensorFileError(f"its files are written with {info['transform_descriptors']}, which is not undone here")
    name, start, length = info["relative_path"], info["offset"], info["length"]
    file = file_inside(folder, name)
    if not (isinstance(start, int) and isinstance(length, int) and start >= 0 and length >= 0):
        raise TypeError(f"a slice of {name} has no place")
    if start + length > file.stat().st_size:
        raise TensorFileError(f"{name} ends before byte {start + length}: it was cut short")
    return _Slice(file, start, length)


def _read(entry: _Tensor) -> Tensor:
    try:
        chunks = [(*box[:2], _chunk(entry.dtype, *box)) for box in entry.boxes]
        return join_chunks(entry.shape, entry.dtype, chunks)
    except (TensorFileError, RuntimeError, MemoryError) as error:  # a shape or type that torch cannot make
        raise TensorFileError(f"{entry.name}: {first_line(error)}") from error


def _chunk(dtype: torch.dtype, offsets: torch.Size, sizes: torch.Size, place: _Slice | None) -> Tensor | None:
    if place is None:
        return None
    content = _load(place)
    # Parameters are tensors too; a class with behaviour of its own is not.
    if type(content) not in (Tensor, Parameter) or content.layout != torch.strided or content.device.type != "cpu":
        raise TensorFileError(f"{place.file.name}: holds something else than a plain tensor")
    if content.shape != sizes or content.dtype != dtype:
        raise TensorFileError(f"its chunk at {list(offsets)} has another shape or type than the metadata says")
    plain: Tensor = content.detach()
    return plain


def _load(place: _Slice) -> Any:
    """The object that torch has saved in a slice."""
    try:
        with place.file.open("rb") as stream:
            stream.seek(place.start)
            return load_pickle(io.BytesIO(stream.read(place.length)))
    except OSError as error:
        raise TensorFileError(f"{place.file.name}: cannot be read: {error.strerror}") from error
    except TensorFileError as error:
        raise TensorFileError(f"{place.file.name}: {error}") from error
