"""Folders that one process has to itself."""

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

    Forks do not have the lock: it ends with this process, whatever they do.

    Raises:
        BlockingIOError: Another process has it.
        OSError: The folder cannot be opened.
    """
    lock = os.open(folder, os.O_RDONLY)
    _held.add(lock)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        if lock in _held:
            _held.discard(lock)
            os.close(lock)


def _leave_to_parent() -> None:
    """Closes the locks that a fork was given: each would hold the folder until it ends, too."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_leave_to_parent)
