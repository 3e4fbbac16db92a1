"""Links that lead nowhere: said where a file or folder is missed."""

from __future__ import annotations

from pathlib import Path


def dead_link(path: Path) -> str:
    """`; X is a link to Y, which is not there` to put behind a message, if that is why a path is missing."""
    for each in (path, *path.parents):
        try:
            if each.is_symlink() and not each.exists():
                return f"; {each} is a link to {each.readlink()}, which is not there"
        except OSError:
            return ""
    return ""
