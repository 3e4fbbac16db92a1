"""A file that lies in another one: in a shard, or in a cell of a table."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from numpy.typing import NDArray

# How an object of `Blob.open` is named in messages of Pillow.
_STREAM = re.compile(r" <_io\.BytesIO object at 0x[0-9a-f]+>")


@dataclass(frozen=True)
class Blob:
    """The content of a file.

    Attributes:
        name: How messages name it; one that ends in `.npy` holds an array.
        content: Its bytes, or the array itself.
    """

    name: str
    content: bytes | NDArray[Any]

    def __str__(self) -> str:
        return self.name


Readable = Path | Blob


def open_bytes(file: Readable) -> BinaryIO:
    """The bytes of a file; those of an array that is one itself are never asked for."""
    if isinstance(file, Path):
        return file.open("rb")
    assert isinstance(file.content, bytes)
    return io.BytesIO(file.content)


def array_of(file: Readable) -> NDArray[Any] | None:
    """The array, if it is one itself."""
    return file.content if isinstance(file, Blob) and not isinstance(file.content, bytes) else None


def is_npy(file: Readable) -> bool:
    """Whether it holds an array."""
    return array_of(file) is not None or str(file).endswith(".npy")


def reason(file: Readable, error: Exception) -> str:
    """Why a file cannot be read, without its name."""
    why = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
    return _STREAM.sub("", why.replace(f" {str(file)!r}", ""))
