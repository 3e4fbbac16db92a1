"""Digests of files of shards: whether they hold what was written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mtl.checkpoint.tensor_file import ShardFile, TensorFileError, file_inside, shard_files
from mtl.runtime.fingerprint import fingerprint, root


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
    """What is wrong with a checkpoint's files of shards, one sentence each."""
    found = []
    for name, digest in shard_files(state).items():
        try:
            if shards_digest(ShardFile(file_inside(folder, name)).shards()) != digest:
                found.append(f"{folder / name}: holds other tensors than were written at this step")
        except TensorFileError as error:
            found.append(f"{folder / name}: cannot be read: {error}")
    return found
