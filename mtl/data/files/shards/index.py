"""Where each member of each sample lies in its shard, so that samples can be read in any order."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from mtl.data.cache import DataError
from mtl.data.files.blob import Blob
from mtl.data.files.mistakes import Mistakes
from mtl.data.files.shards.kept import Column, KeptIndices, ShardIndex, Stamp, stamp_of
from mtl.data.files.shards.names import split_name

# Members that webdataset keeps for itself.
_META = re.compile(r"__[^/]*__($|/)")
_BLOCK = 512


@dataclass(frozen=True)
class Members:
    """The members of one extension, or the first of several that each sample has.

    Attributes:
        offsets: "n", int64, where each sample's begins in its shard, in bytes; -1 if it has none.
        sizes: "n", int64, in bytes.
        extensions: "n", int16, the place of its extension among those asked for.
    """

    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    extensions: NDArray[np.int16]


@dataclass
class Index:
    """The samples of some shards, in their order.

    Attributes:
        files: The shards.
        stamps: Path, size in bytes and time in ns of each, as they were when they were indexed.
        keys: The key of each sample.
        ends: Samples in the shards up to each, itself included.
        columns: The members by extension.
    """

    files: tuple[Path, ...]
    stamps: list[Stamp] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    columns: dict[str, Column] = field(default_factory=dict)

    def file(self, sample: int) -> Path:
        """The shard of a sample."""
        return self.files[int(np.searchsorted(self.ends, sample, side="right"))]

    def where(self, sample: int) -> str:
        """A sample as messages name it."""
        return f"{self.file(sample)}, {self.keys[sample]}"

    def members(self, extensions: Sequence[str]) -> Members:
        """The first member of each sample that has one of the extensions."""
        num = len(self.keys)
        found = Members(np.full(num, -1, np.int64), np.zeros(num, np.int64), np.zeros(num, np.int16))
        for place, extension in reversed(list(enumerate(extensions))):
            if (column := self.columns.get(extension)) is not None:
                samples = np.array(column.samples, np.int64)
                found.offsets[samples], found.sizes[samples] = column.offsets, column.sizes
                found.extensions[samples] = place
        return found

    def blob(self, sample: int, members: Members, extensions: Sequence[str]) -> Blob | None:
        """A member's bytes; None if the sample has none.

        The shard is opened each time: nothing is shared by threads and worker processes, however many shards there are.

        Raises:
            DataError: It cannot be read.
        """
        offset, size = int(members.offsets[sample]), int(members.sizes[sample])
        if offset < 0:
            return None
        name = f"{PurePosixPath(self.keys[sample]).name}.{extensions[members.extensions[sample]]}"
        try:
            with self.file(sample).open("rb", buffering=0) as stream:
                stream.seek(offset)
                content = stream.read(size)
        except OSError as error:
            raise DataError(f"{name}: {error.strerror}") from error
        if content is None or len(content) != size:
            raise DataError(f"{name}: the shard is shorter than when it was indexed")
        return Blob(name, content)


def index_shards(files: tuple[Path, ...], kept: KeptIndices, mistakes: Mistakes) -> Index:
    """Reads the headers of all members, one shard after the other; those of a shard that was indexed before are kept.

    Args:
        files: The shards.
        kept: The indices of shards as they were.
        mistakes: Receives what is wrong with them: missing or truncated files, links, paths that leave a folder, keys
            whose members are not next to each other.

    Raises:
        SettingError: webdataset is not installed.
    """
    index = Index(files)
    for file in files:
        try:
            stamp, own = _index_one(file, kept, mistakes)
            index.stamps.append(stamp)
            for extension, column in own.columns.items():
                index.columns.setdefault(extension, Column()).add(column, len(index.keys))
            index.keys += own.keys
        except tarfile.TarError as error:
            mistakes.add(f"{file}: expected a whole tar file, not compressed; {error}")
        except OSError as error:
            mistakes.add(f"{file}: {error.strerror or error}")
        index.ends.append(len(index.keys))
    return index


def _index_one(file: Path, kept: KeptIndices, mistakes: Mistakes) -> tuple[Stamp, ShardIndex]:
    with file.open("rb") as stream:
        stamp = stamp_of(file, stream.fileno())
        if (found := kept.read(stamp)) is not None:
            return stamp, found
        before, own = len(mistakes), ShardIndex()
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            _read_headers(tar, file, own, mistakes)
            _check_end(tar, file)
    if not own.keys:
        mistakes.add(f"{file}: expected samples, got no member with a key and an extension")
    if len(mistakes) == before:
        kept.write(stamp, own)
    return stamp, own


def _read_headers(tar: tarfile.TarFile, file: Path, index: ShardIndex, mistakes: Mistakes) -> None:
    split, key, seen = split_name(), None, set[str]()
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # kept for access by name, which nobody asks for
        if member.isdir() or _META.match(member.name):
            continue
        if fault := _fault_of(member):
            mistakes.add(f"{file}: member {member.name!r} {fault}")
            continue
        own, extension = split(member.name)
        if own is None or extension is None:
            continue
        if own != key:
            key = own
            if key in seen:
                what = "expected the members of a sample next to each other, as tar --sort=name puts them"
                mistakes.add(f"{file}, {key}: {what}; {member.name} comes later")
            seen.add(key)
            index.keys.append(key)
        column, sample = index.columns.setdefault(extension.lower(), Column()), len(index.keys) - 1
        if column.samples and column.samples[-1] == sample:
            mistakes.add(f"{file}, {key}: has two members {extension.lower()}")
            continue
        column.samples.append(sample)
        column.offsets.append(member.offset_data)
        column.sizes.append(member.size)


def _fault_of(member: tarfile.TarInfo) -> str:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        return "has a path that leaves the shard"
    if not member.isreg():
        return "is no file: links and devices are refused"
    return "has holes: sparse files are refused" if member.issparse() else ""


def _check_end(tar: tarfile.TarFile, file: Path) -> None:
    """Raises `TarError` if the headers end elsewhere than at the mark of the end, which `tarfile` takes in silence."""
    with file.open("rb") as stream:
        stream.seek(tar.offset)
        block = stream.read(_BLOCK)
    if len(block) < _BLOCK:
        raise tarfile.ReadError("it has been cut off: there is no mark of its end")
    if any(block):
        raise tarfile.ReadError(f"the header at byte {tar.offset} is damaged")
