"""The index of each shard on disk, so that headers are read once and not whenever a run begins."""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from mtl.runtime.console import logger
from mtl.runtime.fingerprint import fingerprint_of_json

# Another one wherever the index of the same shard would be another.
_FORMAT = 1

Stamp = tuple[str, int, int]


def _numbers() -> array[int]:
    return array("q")


@dataclass
class Column:
    """The members of one extension: of which samples, where they begin, and how large they are, in bytes."""

    samples: array[int] = field(default_factory=_numbers)
    offsets: array[int] = field(default_factory=_numbers)
    sizes: array[int] = field(default_factory=_numbers)

    def add(self, other: Column, first: int) -> None:
        """Appends the members of samples that are counted from `first` on."""
        self.samples.extend([sample + first for sample in other.samples])
        self.offsets.extend(other.offsets)
        self.sizes.extend(other.sizes)


@dataclass
class ShardIndex:
    """The samples of one shard.

    Attributes:
        keys: The key of each, in their order.
        columns: The members by extension.
    """

    keys: list[str] = field(default_factory=list)
    columns: dict[str, Column] = field(default_factory=dict)


class KeptIndices:
    """A folder with an index for each shard, by path, size and time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._is_writable = True

    def read(self, stamp: Stamp) -> ShardIndex | None:
        """The index of a shard; None if there is none, or, with a warning, if it is damaged."""
        file = self._file(stamp)
        try:
            digest, _, text = file.read_text(encoding="utf-8").partition("\n")
        except OSError:
            # None is kept yet; where the folder cannot be read, it cannot be written either, which warns.
            return None
        except UnicodeDecodeError:
            digest = text = ""
        if digest != xxhash.xxh3_128_hexdigest(text.encode()):
            logger.warning(f"{file} is damaged: the index of {stamp[0]} is made again")
            return None
        keys, columns = json.loads(text)
        return ShardIndex(keys, {name: Column(*(array("q", each) for each in own)) for name, own in columns.items()})

    def write(self, stamp: Stamp, index: ShardIndex) -> None:
        """Keeps an index, whole or not at all; a warning says if that cannot be done, once."""
        own = {name: [list(each.samples), list(each.offsets), list(each.sizes)] for name, each in index.columns.items()}
        text = json.dumps([index.keys, own])
        temporary = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=self._folder, delete=False) as stream:
                temporary = Path(stream.name)
                stream.write(f"{xxhash.xxh3_128_hexdigest(text.encode())}\n{text}")
            temporary.replace(self._file(stamp))
        except OSError as error:
            if temporary is not None:
                temporary.unlink(missing_ok=True)
            if self._is_writable:
                what = f"the index of {stamp[0]} cannot be kept in {self._folder}: {error.strerror}"
                logger.warning(f"{what}; shards are indexed again when the next run begins")
            self._is_writable = False

    def _file(self, stamp: Stamp) -> Path:
        return self._folder / f"{fingerprint_of_json([_FORMAT, *stamp])}.json"


def stamp_of(file: Path, descriptor: int) -> Stamp:
    """Path, size in bytes and time in ns of an open shard."""
    status = os.fstat(descriptor)
    return (os.path.realpath(file), status.st_size, status.st_mtime_ns)
