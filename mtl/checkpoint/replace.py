"""A folder that takes the place of another one: whenever the process is killed, one of the two is there, complete."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mtl.checkpoint.load import ASIDE
from mtl.runtime.files import sync

# A folder that is half written or half removed.
UNFINISHED = ".tmp"


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A folder to be filled, which takes the place of the target once it is, and goes if it cannot be filled."""
    temporary = hidden(target, UNFINISHED)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        sync(temporary)
        _put(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _put(temporary: Path, target: Path) -> None:
    aside = hidden(target, ASIDE)
    if target.exists():
        target.rename(aside)
    try:
        temporary.rename(target)
    except OSError:
        if aside.exists():
            aside.rename(target)
        raise
    if aside.exists():
        sync(target.parent)
        remove(aside)


def remove(folder: Path) -> None:
    """Removes a checkpoint, or one that was moved aside; what a killed process leaves of it is never read."""
    unfinished = hidden(folder, UNFINISHED)
    shutil.rmtree(unfinished, ignore_errors=True)
    folder.rename(unfinished)
    shutil.rmtree(unfinished)


def hidden(folder: Path, suffix: str) -> Path:
    """The name next to a checkpoint's folder under which it is unfinished, or moved aside."""
    plain = folder.name.strip(".").removesuffix(ASIDE)
    return folder.with_name(f".{plain}{suffix}")
