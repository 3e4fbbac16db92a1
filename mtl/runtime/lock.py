"""Locks that end with the process that took them, whatever its forks do; folders that one process has to itself."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_held = set[int]()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A folder that is this process's alone while the block runs.

    Raises:
        BlockingIOError: Another process has it.
        OSError: The folder cannot be opened.
    """
    lock = open_lock(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        close_lock(lock)


def open_lock(path: Path, flags: int) -> int:
    """As `os.open`, of a file or folder to lock; forks do not get it."""
    lock = os.open(path, flags, 0o666)
    _held.add(lock)
    return lock


def close_lock(lock: int) -> None:
    """Closes what `open_lock` has opened; in a fork, where it is closed, nothing."""
    if lock in _held:
        _held.discard(lock)
        os.close(lock)


def _leave_to_parent() -> None:
    """Closes the locks that a fork was given: each would hold the folder until it ends, too."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_leave_to_parent)
