"""Paths in tables and lists: relative to a folder, which they do not leave unless they are allowed to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

from mtl.data.cache import DataError
from mtl.data.files.reading import inside


def wrong_paths(paths: Sequence[str], outside: bool) -> Iterator[tuple[int, str]]:
    """Those that are no paths, or leave the folder by what is written; links are followed when a file is read.

    Args:
        paths: Relative to a folder; an empty one is none.
        outside: Whether they may leave it.

    Yields:
        The place of each, and what is wrong.
    """
    text = "\n".join(["", *paths])
    if not any(sign in text for sign in ("\0", "..", "\n/")):
        return  # as for nearly every table; the only step that a million rows take
    for place, path in enumerate(paths):
        if "\0" in path:
            yield place, f"expected a path, got {path!r}"
        elif not outside and (".." in path or path[:1] == "/") and _leaves(path):
            yield place, f"{path} leaves the folder; data.outside=true allows it"


def _leaves(path: str) -> bool:
    pure, depth = PurePath(path), 0
    for part in pure.parts:
        depth += -1 if part == ".." else 1
        if depth < 0:
            return True
    return pure.is_absolute()


def path_in(folder: Path, path: str, outside: bool) -> Path:
    """The file of a path.

    Raises:
        DataError: It leaves the folder, by a link or by what is written, and may not.
    """
    if outside:
        return folder / path
    try:
        return inside(folder, path)
    except DataError as error:
        raise DataError(f"{error}; data.outside=true allows it") from error
    except (OSError, RuntimeError, ValueError) as error:  # of a circle of links, a NUL
        raise DataError(f"{path!r}: {error}") from error
