"""Files: written whole and forced to disk; JSON, read and written; errors of the system about them; dead links."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mtl.runtime.text import short_repr


def is_full(error: Exception) -> bool:
    """Whether an error means that a disk is full, or this user's share of it."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


# What can happen to any program: a full disk, a missing permission, a fault, a mount that is gone.
_OF_THE_MACHINE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE, errno.ENOTCONN, errno.EMFILE, errno.ENFILE),
)


def is_of_the_machine(error: Exception) -> bool:
    """Whether an error comes from the disk or the system, not from this program."""
    return isinstance(error, OSError) and error.errno in _OF_THE_MACHINE


def in_one_line(error: Exception) -> str:
    """`file: reason` of a system's error; the message of any other."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def dead_link(path: Path) -> str:
    """`; X is a link to Y, which is not there` to append to a message, if that is why a path is missing."""
    for each in (path, *path.parents):
        try:
            if each.is_symlink() and not each.exists():
                return f"; {each} is a link to {each.readlink()}, which is not there"
        except OSError:
            return ""
    return ""


class VectoredIO(Protocol):
    """`os.preadv` or `os.pwritev`: moves bytes between buffers and a file, and returns how many."""

    def __call__(self, file: int, buffers: Sequence[memoryview], at: int, /) -> int: ...


def all_bytes(call: VectoredIO, file: int, buffers: Sequence[memoryview], at: int) -> int:
    """Reads or writes until all is done, which mostly is one call, or until nothing comes any more.

    Returns:
        How many bytes were moved.
    """
    rest = [*buffers]
    size, done = sum(map(len, rest)), 0
    while moved := call(file, rest, at + done):
        done += moved
        if done == size:
            break
        # A call may do less, for instance when the disk becomes full; the next one raises the reason.
        rest, skip = [], done
        for buffer in buffers:
            rest.append(buffer[skip:])
            skip = max(0, skip - len(buffer))
    return done


def sync(path: Path) -> None:
    """Forces a file, or what a folder lists, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(file: Path, content: bytes) -> None:
    """Writes a file that nobody reads yet, and forces it to disk."""
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def write_text(file: Path, text: str) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(file, text.encode())


def write_bytes(file: Path, content: bytes) -> None:
    """Writes a file under another name, forces it to disk and renames it, so that no reader ever sees half of it."""
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        write_synced(temporary, content)
        temporary.replace(file)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(file.parent)


class JsonFileError(ValueError):
    """A file that holds no JSON object; the message names it."""


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        JsonFileError: It is cut short, is no JSON, or holds something else.
        OSError: It cannot be read.
    """
    written = file.read_bytes()
    try:
        content = json.loads(written)
    except (ValueError, RecursionError) as error:
        raise JsonFileError(f"{file}: cannot be read: {error}; it is cut short, or is not JSON") from error
    if not isinstance(content, dict):
        raise JsonFileError(f"{file}: expected keys and values, got {short_repr(content)}")
    return content


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    write_text(file, json.dumps(without_nan(content), indent=2, allow_nan=False) + "\n")


def without_nan(content: Any) -> Any:
    """Plain data with null for numbers that are not finite, which JSON does not have."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_nan(value) for value in content]
    return content
