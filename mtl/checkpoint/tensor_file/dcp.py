"""Tensors out of a folder of `torch.distributed.checkpoint`; nothing in it is ever run.

A pickle, `.metadata`, says which slice of which file holds which box of which tensor. It is read with stand-ins that
only keep what was stored: no class that it names is called, neither torch's own nor anyone's.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from mtl.checkpoint.tensor_file.contents import KeyPath, Leaves
from mtl.checkpoint.tensor_file.single import TensorFileError, load_pickle
from mtl.runtime.console import first_line

METADATA = ".metadata"

_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
_OF_METADATA = (
    "Metadata",
    "TensorStorageMetadata",
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "TensorProperties",
    "MetadataIndex",
    "StorageMeta",
    "_MEM_FORMAT_ENCODING",
)
# What `.metadata` may name, besides types of elements and torch.Size.
_KNOWN = (
    *(f"torch.distributed.checkpoint.metadata.{name}" for name in _OF_METADATA),
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    # Where earlier versions of torch had them.
    "torch.distributed._shard.sharded_tensor.metadata.TensorProperties",
    "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING",
    "torch.serialization._get_layout",
    # Where the checkpoint was written, as a path; Python 3.13 has moved the classes.
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in _PATHS),
    # Python 3.11.2, for one, writes a member of an enum as a call of this; the stand-in looks nothing up.
    "builtins.getattr",
)


class _Stored:
    """Stands in for what the pickle calls: keeps the arguments and the attributes."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __setstate__(self, state: object) -> None:
        vars(self).update(state if isinstance(state, dict) else {"state": state})


_STAND_INS = {name: type(name.rpartition(".")[2], (_Stored,), {}) for name in _KNOWN}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if stand_in := _STAND_INS.get(f"{module}.{name}"):
            return stand_in
        # Not by getattr, for which torch imports some of its parts.
        found = vars(torch).get(name) if module == "torch" else None
        if found is torch.Size or isinstance(found, torch.dtype):
            return found
        raise TensorFileError(f"it names {module}.{name}, which the metadata of a checkpoint does not need; not run")


@dataclass(frozen=True)
class _Slice:
    """Where one box of a tensor is: `length` bytes from `start` in a file."""

    file: Path
    start: int
    length: int


@dataclass(frozen=True)
class _Entry:
    """A tensor as the metadata describes it; `slices` has None for a box of no elements."""

    dtype: torch.dtype
    shape: torch.Size
    boxes: tuple[tuple[torch.Size, torch.Size], ...]
    slices: tuple[_Slice | None, ...]


def read_dcp(folder: Path) -> Leaves:
    """All that a distributed checkpoint holds, each tensor whole, put together from its chunks.

    Args:
        folder: A folder with `.metadata`.

    Raises:
        TensorFileError: A file is missing, damaged, or holds code in the place of a tensor; the chunks of a tensor
            leave a gap or overlap; or a slice is compressed, or outside the folder.
    """
    metadata = _unpickled(folder / METADATA)
    try:
        entries = _entries(folder, metadata)
    except TensorFileError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise TensorFileError(f"it is not the metadata of a distributed checkpoint: {first_line(error)}") from error
    leaves = Leaves()
    for path, entry in entries:
        if isinstance(entry, _Entry):
            leaves.add(_read(".".join(map(str, path)), entry), path)
            continue
        try:
            leaves.add(_load(entry), path)
        except TensorFileError as error:
            leaves.leave_out(path, str(error))
    return leaves


def file_inside(folder: Path, name: object) -> Path:
    """The file of a folder that an index names; it may be a link, as in the cache of Hugging Face.

    Raises:
        TensorFileError: The name leads out of the folder, or there is no such file.
    """
    if not isinstance(name, str):
        raise TensorFileError(f"it names {name!r} as a file")
    # The file may have been written on the other system.
    for form in (PurePosixPath(name), PureWindowsPath(name)):
        if form.anchor or ".." in form.parts:
            raise TensorFileError(f"it names {name}, which is outside the folder; not read")
    file = folder / PurePath(name)
    if not file.is_file():
        raise TensorFileError(f"it names {name}, which is missing")
    return file


def assemble(
    shape: Sequence[int], dtype: torch.dtype, chunks: Iterable[tuple[Sequence[int], Sequence[int], Tensor | None]]
) -> Tensor:
    """One tensor from its chunks, which have to cover it exactly.

    Args:
        shape: Of the whole.
        dtype: Of the whole.
        chunks: Offsets, sizes and elements of each; a chunk of no elements may have None.

    Raises:
        TensorFileError: A chunk reaches out of the tensor, two overlap, or there is a gap.
    """
    boxes = list(chunks)
    for offsets, sizes, _ in boxes:
        fits = len(offsets) == len(sizes) == len(shape)
        if not fits or any(o < 0 or s < 0 or o + s > whole for o, s, whole in zip(offsets, sizes, shape, strict=True)):
            raise TensorFileError(f"a chunk at {list(offsets)} of sizes {list(sizes)} is not inside {list(shape)}")
    # Compared before any memory is taken: a shape is only a claim until there are chunks that fill it.
    held, needed = sum(math.prod(sizes) for _, sizes, _ in boxes), math.prod(shape)
    if held != needed:
        raise TensorFileError(
            f"its chunks {'leave a gap' if held < needed else 'overlap'}: {held} of {needed} elements"
        )
    whole, covered = torch.empty(tuple(shape), dtype=dtype), torch.zeros(tuple(shape), dtype=torch.bool)
    for offsets, sizes, chunk in boxes:
        if chunk is None:
            continue
        box = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
        if bool(covered[box].any()):
            raise TensorFileError(f"its chunks overlap at {list(offsets)}, and leave a gap elsewhere")
        whole[box], covered[box] = chunk, True
    return whole


def _unpickled(file: Path) -> Any:
    try:
        with file.open("rb") as stream:
            return _Unpickler(stream).load()
    except TensorFileError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise TensorFileError(f"it is no pickle of metadata: {first_line(error)}") from error


def _entries(folder: Path, metadata: Any) -> list[tuple[KeyPath, _Entry | _Slice]]:
    """What the metadata names, by path: tensors, and other things, of which each is in one slice."""
    content = vars(metadata)
    slices: dict[tuple[str, torch.Size | None], _Slice] = {}
    for index, info in content["storage_data"].items():
        place = vars(index)
        # Others than tensors have no offset.
        offset = place.get("offset")
        slices[place["fqn"], None if offset is None else torch.Size(offset)] = _slice(folder, vars(info))
    # How torch has flattened a nested state; without this, nothing was flattened, and a dot is part of a name.
    paths = content.get("planner_data") or {}
    entries: list[tuple[KeyPath, _Entry | _Slice]] = []
    for name, stored in content["state_dict_metadata"].items():
        path = paths.get(name, (name,))
        is_path = isinstance(path, tuple) and path and all(isinstance(key, str | int) for key in path)
        if not isinstance(name, str) or not is_path:
            raise TypeError(f"{name!r} is not described as a part of a state")
        is_tensor = type(stored) is not _STAND_INS["torch.distributed.checkpoint.metadata.BytesStorageMetadata"]
        if not is_tensor and (name, None) not in slices:
            raise TensorFileError(f"{name}: it is in no file")
        entries.append((path, _entry(name, vars(stored), slices) if is_tensor else slices[name, None]))
    return entries


def _entry(name: str, stored: Mapping[str, Any], slices: Mapping[tuple[str, torch.Size | None], _Slice]) -> _Entry:
    dtype, shape = vars(stored["properties"])["state"][0], torch.Size(stored["size"])
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name!r} is not described as a tensor")
    boxes = tuple((torch.Size(vars(chunk)["offsets"]), torch.Size(vars(chunk)["sizes"])) for chunk in stored["chunks"])
    for offsets, sizes in boxes:
        if math.prod(sizes) and (name, offsets) not in slices:
            raise TensorFileError(f"{name}: its chunk at {list(offsets)} is in no file")
    # A process whose share of a tensor is empty writes nothing, and several such shares have one offset.
    found = tuple(slices[name, offsets] if math.prod(sizes) else None for offsets, sizes in boxes)
    return _Entry(dtype, shape, boxes, found)


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


def _read(name: str, entry: _Entry) -> Tensor:
    try:
        loaded = [None if place is None else _load_tensor(place) for place in entry.slices]
        for (offsets, sizes), chunk in zip(entry.boxes, loaded, strict=True):
            if chunk is not None and (chunk.shape != sizes or chunk.dtype != entry.dtype):
                raise TensorFileError(f"its chunk at {list(offsets)} has another shape or type than the metadata says")
        return assemble(entry.shape, entry.dtype, [(*b, chunk) for b, chunk in zip(entry.boxes, loaded, strict=True)])
    except TensorFileError as error:
        raise TensorFileError(f"{name}: {error}") from error
    except (RuntimeError, MemoryError) as error:  # a shape or type that torch cannot make
        raise TensorFileError(f"{name}: {first_line(error)}") from error


def _load(place: _Slice) -> Any:
    """What torch has saved in a slice."""
    try:
        with place.file.open("rb") as stream:
            stream.seek(place.start)
            return load_pickle(io.BytesIO(stream.read(place.length)))
    except OSError as error:
        raise TensorFileError(f"{place.file.name}: cannot be read: {error.strerror}") from error
    except TensorFileError as error:
        raise TensorFileError(f"{place.file.name}: {error}") from error


def _load_tensor(place: _Slice) -> Tensor:
    content = _load(place)
    # Parameters are tensors too; a class with behaviour of its own is not.
    if type(content) not in (Tensor, Parameter) or content.layout != torch.strided or content.device.type != "cpu":
        raise TensorFileError(f"{place.file.name}: holds something else than a plain tensor")
    plain: Tensor = content.detach()
    return plain
