"""Configurations that come with mtl, by name: `scenes`, `recipes/lp_ft`."""

from __future__ import annotations

from pathlib import Path

# In a checkout a link to configs/; an installation has the files themselves.
_FOLDER = Path(__file__).parent / "shipped"


def examples() -> dict[str, Path]:
    """The files by name, which has no suffix."""
    return {file.relative_to(_FOLDER).with_suffix("").as_posix(): file for file in sorted(_FOLDER.rglob("*.yaml"))}


def file_of(text: str | Path, folder: Path = Path()) -> Path:
    """The file that is meant: the one of this path, or if there is none, the example of this name."""
    file, example = folder / text, examples().get(str(text))
    return file if example is None or file.exists() else example
