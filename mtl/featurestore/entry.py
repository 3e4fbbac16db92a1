"""One entry of a folder of features: a file of rows, a checksum of every row, and a card that covers the checksums."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from mtl.featurestore.base import Bytes, Field, Indices
from mtl.runtime.files import all_bytes, sync, write_synced
from mtl.runtime.lock import close_lock, open_lock

ROWS, SUMS, CARD, LOCK = "rows.bin", "sums.bin", "card.json", "lock"
_VERSION = 1


class DamagedEntry(Exception):  # noqa: N818  it is caught inside this package
    """An entry that is not what was written."""


@dataclass(frozen=True)
class Layout:
    """The features that an entry holds, and the inputs they depend on."""

    key: dict[str, Any]
    num_rows: int
    fields: tuple[Field, ...]

    @property
    def row_bytes(self) -> int:
        return sum(field.num_bytes for field in self.fields)

    @property
    def nbytes(self) -> int:
        """Of all files of the entry."""
        return self.num_rows * (self.row_bytes + 8) + len(self.card("0" * 32).encode())

    @property
    def digest(self) -> str:
        """Names the entry: other fields or another number of rows are another entry."""
        return xxhash.xxh3_128_hexdigest(self.card("").encode())

    def card(self, sums_digest: str) -> str:
        """All of the card's text, so that a card is right if it is this text.

        Raises:
            TypeError, ValueError: The key is not JSON.
        """
        fields = [{"shape": field.shape, "dtype": str(field.dtype)} for field in self.fields]
        content = {
            "version": _VERSION,
            "key": self.key,
            "num_rows": self.num_rows,
            "fields": fields,
            "sums": sums_digest,
        }
        return json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"


class Entry:
    """The open files of an entry.

    They are closed when the last user of this object is gone, so that a thread keeps reading the file it began with,
    whatever others do.
    """

    def __init__(self, path: Path, layout: Layout, rows: int, lock: int, sums: NDArray[np.uint64] | None) -> None:
        """An entry of files that are open.

        Args:
            path: Its directory.
            layout: What it holds.
            rows: The descriptor of the file of rows.
            lock: That of the lock file, locked: shared for a complete entry, else exclusively.
            sums: The checksums of all rows; None for an entry without rows.
        """
        self.path, self.layout = path, layout
        self.is_whole = sums is not None
        self.lock = lock
        self._rows = rows
        self._sums = np.zeros(layout.num_rows, np.uint64) if sums is None else sums
        self.present = np.full(layout.num_rows, self.is_whole)
        self.num_present = layout.num_rows if self.is_whole else 0
        self._finalizer = weakref.finalize(self, _close, rows, lock)

    @classmethod
    def begin(cls, path: Path, layout: Layout) -> Entry:
        """Makes an entry without rows.

        Raises:
            OSError: The system does not let it.
        """
        path.mkdir()
        with contextlib.ExitStack() as undo:
            undo.callback(shutil.rmtree, path, ignore_errors=True)
            lock = open_lock(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            undo.callback(close_lock, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            rows = os.open(path / ROWS, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            undo.callback(os.close, rows)
            # Its full length at once: others see how much will be written.
            os.ftruncate(rows, layout.num_rows * layout.row_bytes)
            undo.pop_all()
        return cls(path, layout, rows, lock, None)

    @classmethod
    def open(cls, path: Path, layout: Layout) -> Entry:
        """Opens a complete entry; its rows are checked as they are read.

        Raises:
            DamagedEntry: It is not what was written.
            PermissionError: It belongs to somebody else.
        """
        with contextlib.ExitStack() as undo:
            try:
                lock = open_lock(path / LOCK, os.O_RDONLY)
                undo.callback(close_lock, lock)
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                rows = os.open(path / ROWS, os.O_RDONLY)
                undo.callback(os.close, rows)
                sums = (path / SUMS).read_bytes()
                card = (path / CARD).read_bytes()
            except PermissionError:
                raise
            except OSError as error:
                raise DamagedEntry(str(error)) from error
            if card != layout.card(xxhash.xxh3_128_hexdigest(sums)).encode():
                raise DamagedEntry(f"{CARD} is not the card of these features")
            if os.fstat(rows).st_size != layout.num_rows * layout.row_bytes:
                raise DamagedEntry(f"{ROWS} has {os.fstat(rows).st_size} bytes")
            undo.pop_all()
        return cls(path, layout, rows, lock, np.frombuffer(sums, "<u8").astype(np.uint64))

    def has(self, wanted: Indices) -> bool:
        return self.is_whole or bool(self.present[wanted].all())

    def read(self, wanted: Indices, parts: Sequence[Bytes]) -> None:
        """Reads rows that are there, and checks each.

        Args:
            wanted: "b", which rows.
            parts: Where they go: for every field "b bytes".

        Raises:
            DamagedEntry: A row is not what was written.
            OSError: The system does not give it.
        """
        size = self.layout.row_bytes
        sums = self._sums[wanted].tolist()
        for place, row in enumerate(wanted.tolist()):
            buffers = [part[place].data for part in parts]
            num_read = all_bytes(os.preadv, self._rows, buffers, row * size)
            if num_read != size or _checksum(buffers) != sums[place]:
                raise DamagedEntry(f"row {row} of {ROWS} is not what was written")

    def write(self, wanted: Indices, parts: Sequence[Bytes]) -> None:
        """Writes rows that are not there yet, each once.

        Raises:
            OSError: The system does not take them.
        """
        size = self.layout.row_bytes
        for place, row in enumerate(wanted.tolist()):
            buffers = [part[place].data for part in parts]
            if all_bytes(os.pwritev, self._rows, buffers, row * size) != size:
                raise OSError(f"row {row} was not taken")
            self._sums[row] = _checksum(buffers)
        # Last, so that no reader takes a row that is incomplete.
        self.present[wanted] = True
        self.num_present += len(wanted)

    def seal(self) -> None:
        """Forces the rows to disk, with their checksums and the card."""
        os.fsync(self._rows)
        sums = self._sums.astype("<u8").tobytes()
        write_synced(self.path / SUMS, sums)
        write_synced(self.path / CARD, self.layout.card(xxhash.xxh3_128_hexdigest(sums)).encode())
        sync(self.path)

    def published(self, path: Path) -> None:
        """Its directory now has its final name: others may open it as well."""
        self.path, self.is_whole = path, True
        fcntl.flock(self.lock, fcntl.LOCK_SH)

    def is_at(self, path: Path) -> bool:
        """Whether a directory is this entry, not another one of the same name."""
        try:
            return os.path.samestat(os.fstat(self.lock), (path / LOCK).stat())
        except OSError:
            return False

    def touch(self) -> None:
        """Records that it is in use now."""
        # A folder that cannot be written keeps its entries anyway.
        with contextlib.suppress(OSError):
            os.utime(self.lock)


def _close(rows: int, lock: int) -> None:
    os.close(rows)
    close_lock(lock)


def _checksum(buffers: Sequence[memoryview]) -> int:
    checksum = 0
    for buffer in buffers:
        checksum = xxhash.xxh3_64_intdigest(buffer, checksum)
    return checksum
