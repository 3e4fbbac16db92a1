"""Tables and pictures for tests of data sets in files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from mtl.config.file_data import SplitName, TableData
from mtl.data.files.table import Table
from mtl.tasks.base import LabelKind

KINDS: Mapping[str, LabelKind] = {"label": "class"}


def picture(file: Path, value: Any = 7, size: tuple[int, int] = (4, 3), mode: str = "L") -> None:
    """Writes a picture of one value, by default 4 pixels wide and 3 high."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(file)


def table(
    folder: Path, text: str | bytes, kinds: Mapping[str, LabelKind] = KINDS, which: SplitName = "train", **settings: Any
) -> Table:
    """A split of a table with this text, which both trains and validates unless `settings` say otherwise."""
    file = folder / "a.csv"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    places = {"train": str(file)} | ({} if "split" in settings else {"val": str(file)})
    return Table(TableData.model_validate({"name": "table"} | places | settings), which, kinds)
