"""Tensors that several processes wrote, each its own shards: safetensors, with the shards' offsets in each header.

The files are those of torch's `HuggingFaceStorageWriter(save_distributed=True)`; nothing in them is ever run. A run's
`state.json` has the names, shapes and files of all tensors, and the files' digests: without it, a missing shard would
only make a tensor smaller.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mtl.checkpoint.tensor_file.single import TensorFileError, file_inside
from mtl.runtime.console import first_line
from mtl.runtime.fingerprint import fingerprint, root

# The key of a `state.json` that has the description of all tensors; a checkpoint without it is a plain one.
SHARDS = "shards"
# Folders of a checkpoint's shards.
MODEL, FROZEN, OPTIMIZER = "model", "frozen", "optimizer"
_LAYOUT = "DCP_SHARDING_INFO"


def described(tensor: Tensor) -> str:
    """Type and shape of a full tensor, as `state.json` has them: `float32 64 3`."""
    return " ".join([str(tensor.dtype).removeprefix("torch."), *map(str, tensor.shape)])


def shard_files(state: Mapping[str, Any]) -> dict[str, str]:
    """The digests of a checkpoint's files of shards, by their places in its folder."""
    return {place: digest for place, digest in state["digests"].items() if "/" in place}


def files_of(state: Mapping[str, Any], kind: str) -> dict[str, str]:
    """As `shard_files`, of one of its folders, by their names in that."""
    start = f"{kind}/"
    return {place.removeprefix(start): each for place, each in shard_files(state).items() if place.startswith(start)}


class Shards(Mapping[str, Tensor]):
    """Full tensors by name, each joined when it is asked for, so that no two need be in memory."""

    def __init__(self, folder: Path, state: Mapping[str, Any], kinds: Collection[str]) -> None:
        """Args:
        folder: The checkpoint.
        state: Its `state.json`.
        kinds: Which of its folders.

        Raises:
            TensorFileError: A file is missing or no such file, or the description is none.
        """
        self._described = {
            name: _understood(name, text) for kind in kinds for name, text in state[SHARDS].get(kind, {}).items()
        }
        self._files: dict[str, list[ShardFile]] = {name: [] for name in self._described}
        for place in shard_files(state):
            if place.split("/")[0] in kinds:
                file = ShardFile(file_inside(folder, place))
                for name in file.offsets:
                    if name in self._files:
                        self._files[name].append(file)
                    elif math.prod(file.shape(name)):
                        raise TensorFileError(f"{place}: holds {name}, which state.json does not describe")

    @property
    def shapes(self) -> dict[str, torch.Size]:
        return {name: shape for name, (_, shape) in self._described.items()}

    def __getitem__(self, name: str) -> Tensor:
        """Raises:
        TensorFileError: Its shards are not those of the tensor that is described.
        """
        dtype, shape = self._described[name]
        chunks = [(file.offsets[name], file.read(name)) for file in self._files[name]]
        for _, shard in chunks:
            if shard.dtype != dtype:
                raise TensorFileError(f"{name}: expected shards of {dtype}, got {shard.dtype}")
        try:
            # A process without a share may have written an empty shard.
            return join_chunks(
                shape, dtype, [(offsets, shard.shape, shard) for offsets, shard in chunks if shard.numel()]
            )
        except TensorFileError as error:
            raise TensorFileError(f"{name}: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._described)

    def __len__(self) -> int:
        return len(self._described)


class ShardFile:
    """One process's file.

    Attributes:
        offsets: Where in its tensor each shard begins, by name.
    """

    def __init__(self, file: Path) -> None:
        self._path = file
        try:
            opened: Any = safe_open(file, framework="pt")
            names, layout = opened.keys(), json.loads((opened.metadata() or {})[_LAYOUT])
            self.offsets = {name: [int(each) for each in layout[name]["saved_offsets"]] for name in names}
        except Exception as error:  # safetensors and a damaged layout raise a dozen unrelated types
            raise TensorFileError(f"{file.name} is no file of shards: {first_line(error)}") from error
        self._file = opened

    def shape(self, name: str) -> list[int]:
        shape: list[int] = self._file.get_slice(name).get_shape()
        return shape

    def read(self, name: str) -> Tensor:
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except Exception as error:  # as above
            raise TensorFileError(f"{self._path.name}: {name}: {first_line(error)}") from error
        return tensor

    def shards(self) -> Iterator[tuple[str, list[int], Tensor]]:
        return ((name, offsets, self.read(name)) for name, offsets in self.offsets.items())


def join_chunks(
    shape: Sequence[int], dtype: torch.dtype, chunks: Iterable[tuple[Sequence[int], Sequence[int], Tensor | None]]
) -> Tensor:
    """One tensor from its chunks, which have to cover it exactly.

    Args:
        shape: Of the full tensor.
        dtype: Of the full tensor.
        chunks: Offsets, sizes and elements of each; a chunk of no elements may have None.

    Raises:
        TensorFileError: A chunk reaches out of the tensor, two overlap, or there is a gap.
    """
    boxes = list(chunks)
    for offsets, sizes, _ in boxes:
        fits = len(offsets) == len(sizes) == len(shape)
        if not fits or any(o < 0 or s < 0 or o + s > end for o, s, end in zip(offsets, sizes, shape, strict=True)):
            raise TensorFileError(f"a chunk at {list(offsets)} of sizes {list(sizes)} is not inside {list(shape)}")
    # Compared before any memory is taken: a shape is only a claim until there are chunks that fill it.
    held, needed = sum(math.prod(sizes) for _, sizes, _ in boxes), math.prod(shape)
    if held != needed:
        raise TensorFileError(
            f"its chunks {'leave a gap' if held < needed else 'overlap'}: {held} of {needed} elements"
        )
    full, covered = torch.empty(tuple(shape), dtype=dtype), torch.zeros(tuple(shape), dtype=torch.bool)
    for offsets, sizes, chunk in boxes:
        if chunk is None:
            continue
        box = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
        if bool(covered[box].any()):
            raise TensorFileError(f"its chunks overlap at {list(offsets)}, and leave a gap elsewhere")
        full[box], covered[box] = chunk, True
    return full


def shards_digest(shards: Iterable[tuple[str, Sequence[int], Tensor]]) -> str | None:
    """One digest of a file's shards: of names, of where they begin, and of elements; None if there are no elements."""
    prints = {f"{name} {list(offsets)}": fingerprint(shard) for name, offsets, shard in shards if shard.numel()}
    return root(prints) if prints else None


def file_digest(file: Path) -> str | None:
    """`shards_digest` of a file; None if it cannot be read."""
    try:
        return shards_digest(ShardFile(file).shards())
    except TensorFileError:
        return None


def damaged_shards(folder: Path, state: Mapping[str, Any]) -> list[str]:
    """The faults of a checkpoint's files of shards, one sentence each."""
    found = []
    for name, digest in shard_files(state).items():
        try:
            if shards_digest(ShardFile(file_inside(folder, name)).shards()) != digest:
                found.append(f"{folder / name}: holds other tensors than were written at this step")
        except TensorFileError as error:
            found.append(f"{folder / name}: cannot be read: {error}")
    return found


def _understood(name: str, text: object) -> tuple[torch.dtype, torch.Size]:
    words = text.split() if isinstance(text, str) else []
    dtype = vars(torch).get(words[0]) if words else None
    if not isinstance(dtype, torch.dtype) or not all(word.isdecimal() for word in words[1:]):
        raise TensorFileError(f"state.json describes {name} as {text!r}; expected a type and a shape")
    return dtype, torch.Size(map(int, words[1:]))
