"""The folder that entries of features share: leftovers of dead processes, entries in use, and which to evict."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from mtl.featurestore.entry import LOCK, DamagedEntry, Entry, Layout
from mtl.runtime.console import logger
from mtl.runtime.files import sync
from mtl.runtime.lock import close_lock, open_lock

_ENTRY = re.compile(r"[0-9a-f]{32}")
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.[0-9a-f]{8}")
_CANNOT_WRITE = (errno.EROFS, errno.EACCES, errno.EPERM)


class NoRoom(Exception):  # noqa: N818  it is caught inside this package
    """An entry that would not fit; the message has the reason."""


class StoreFolder:
    """A folder of entries, `<digest>`, and of unfinished ones, `.<digest>.<random>`.

    What lists or changes directories is called with the folder locked, so that one process at a time does so. Nothing
    else in the folder is ever touched.
    """

    def __init__(self, path: Path, max_bytes: int | None, spare_bytes: int) -> None:
        self.path, self._max_bytes, self._spare_bytes = path, max_bytes, spare_bytes

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """No other process changes the folder meanwhile. Not to be nested."""
        if not self.path.is_dir():
            self.path.mkdir(parents=True, exist_ok=True)
        try:
            lock = open_lock(self.path / ".lock", os.O_RDWR | os.O_CREAT)
        except OSError as error:
            if error.errno not in _CANNOT_WRITE:
                raise
            # A folder that can only be read still serves its entries.
            lock = open_lock(self.path / ".lock", os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            close_lock(lock)

    def open(self, layout: Layout) -> Entry | None:
        """The entry of a layout; None if there is none. One that is damaged is removed."""
        path = self.path / layout.digest
        if not path.exists():
            return None
        try:
            entry = Entry.open(path, layout)
        except DamagedEntry as error:
            logger.warning("%s", damage(path, error))
            self.remove(path)
            return None
        entry.touch()
        return entry

    def begin(self, layout: Layout) -> Entry:
        """A new entry under a temporary name, after others were removed to make room.

        Raises:
            NoRoom: It would not fit.
            OSError: The system does not let it.
        """
        self.sweep()
        self.make_room(layout.nbytes)
        return Entry.begin(self._temporary(layout.digest), layout)

    def publish(self, entry: Entry) -> None:
        """Gives a sealed entry its final name."""
        target = self.path / entry.layout.digest
        entry.path.rename(target)
        entry.published(target)
        sync(self.path)
        entry.touch()

    def remove(self, path: Path) -> None:
        """Removes an entry; a process that has it open continues with the files it has."""
        # Renamed first: if this process dies half-way, what is left is nobody's, not a damaged entry.
        gone = self._temporary(path.name)
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def sweep(self) -> None:
        """Removes the leftovers of dead processes."""
        for path in self._matching(_TEMPORARY):
            if not _is_in_use(path):
                shutil.rmtree(path, ignore_errors=True)

    def make_room(self, nbytes: int, dry: bool = False) -> None:
        """Removes entries, the least recently used first, until a number of bytes more fits.

        Args:
            nbytes: Of the new entry.
            dry: Remove nothing, only look whether it could be done.

        Raises:
            NoRoom: They do not fit.
        """
        if self._max_bytes is not None and nbytes > self._max_bytes:
            raise NoRoom(f"they need {nbytes:,} bytes and at most {self._max_bytes:,} are allowed")
        entries = {path: _sizes(path) for path in self._matching(_ENTRY)}
        unfinished = {path: _sizes(path) for path in self._matching(_TEMPORARY)}
        total = sum(length for length, _ in [*entries.values(), *unfinished.values()])
        # What others have begun and not yet written is not free.
        promised = sum(max(0, length - on_disk) for length, on_disk in unfinished.values())
        free = shutil.disk_usage(self.path).free - promised
        victims = []
        for path in sorted(entries, key=_last_use):
            if (self._max_bytes is None or total + nbytes <= self._max_bytes) and free >= nbytes + self._spare_bytes:
                break
            if not _is_in_use(path):
                victims.append(path)
                total, free = total - entries[path][0], free + entries[path][1]
        if self._max_bytes is not None and total + nbytes > self._max_bytes:
            raise NoRoom(f"they need {nbytes:,} bytes; of {self._max_bytes:,} allowed, {total:,} are in use")
        if free < nbytes + self._spare_bytes:
            spare = f"{self._spare_bytes:,} to be left free"
            raise NoRoom(f"they need {nbytes:,} bytes and {spare}; the disk has {max(free, 0):,}")
        for path in [] if dry else victims:
            logger.info("features %s are removed to make room; they were used longest ago", path)
            self.remove(path)

    def _temporary(self, digest: str) -> Path:
        return self.path / f".{digest}.{secrets.token_hex(4)}"

    def _matching(self, names: re.Pattern[str]) -> list[Path]:
        return [path for path in self.path.iterdir() if names.fullmatch(path.name)]


def damage(path: Path, error: Exception) -> str:
    """The message about a damaged entry."""
    return f"features {path} are damaged ({error}); they are removed and computed again"


def _is_in_use(path: Path) -> bool:
    """Whether a process that lives has the entry open: the system drops its lock when it dies."""
    try:
        lock = os.open(path / LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError:
        return True  # somebody else's
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False


def _last_use(path: Path) -> tuple[int, str]:
    try:
        return (path / LOCK).stat().st_mtime_ns, path.name
    except OSError:
        return 0, path.name


def _sizes(path: Path) -> tuple[int, int]:
    """Bytes of a directory's files: how long they are, and how much of the disk they take."""
    length, taken = 0, 0
    # Its owner may be removing it right now.
    with contextlib.suppress(OSError):
        for file in path.iterdir():
            found = file.stat()
            length, taken = length + found.st_size, taken + found.st_blocks * 512
    return length, taken
