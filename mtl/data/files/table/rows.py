"""Reads the tables of a data set: the rows of each split, and how the cells of each label are parsed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mtl.config.file_data import TableData
from mtl.data.files.fileset import IMAGE
from mtl.data.files.label_files import FILE_KINDS, check_scale
from mtl.data.files.mistakes import Mistakes
from mtl.data.files.paths import wrong_paths
from mtl.data.files.table.cells import Language
from mtl.data.files.table.coded import Coded, check_cells, learn_languages
from mtl.data.files.table.division import divide
from mtl.data.files.table.sheet import Sheet, column_names, read_sheet
from mtl.runtime.collection import without_collection
from mtl.tasks.base import LabelKind


@dataclass(frozen=True)
class TableRows:
    """The rows of one split.

    Attributes:
        file: The table.
        unit: What the numbers of rows count.
        places: "n", int64, the number of each row in the table.
        paths: The paths in each row, by `image` and the labels in files; empty for no label.
        values: The other labels.
    """

    file: Path
    unit: str
    places: NDArray[np.int64]
    paths: Mapping[str, Sequence[str]]
    values: Mapping[str, Coded]

    def where(self, index: int) -> str:
        """A row of the split as messages name it."""
        return f"{self.file}, {self.unit} {self.places[index]}"


@dataclass(frozen=True)
class Tables:
    """The columns that are read of a data set's tables.

    Attributes:
        parts: The rows of each split there is.
        languages: How cells are parsed, by label.
    """

    parts: Mapping[str, TableRows]
    languages: Mapping[str, Language]


def label_names(settings: TableData) -> tuple[str, ...]:
    """The columns of the training table that can be labels.

    Raises:
        DataError: It cannot be read.
        SettingError: It is Parquet, and pyarrow is not installed.
    """
    names = column_names(Path(settings.train).expanduser())
    return tuple(name for name in names if name and name not in _other_columns(settings))


def read_tables(settings: TableData, kinds: Mapping[str, LabelKind]) -> Tables:
    """Reads every table of a data set once and checks it; no image or other file is opened.

    Args:
        settings: Where the tables are.
        kinds: What each label is, by column.

    Raises:
        DataError: Something is wrong with the tables: all of it in a line each, with file and row.
        SettingError: A key of `scale` is no depth; a table is Parquet, and pyarrow is not installed.
    """
    check_scale(settings.scale, kinds)
    # It would look through a million cells again and again, which takes as long as reading them.
    with without_collection():
        return _read_tables(settings, kinds)


def _read_tables(settings: TableData, kinds: Mapping[str, LabelKind]) -> Tables:
    mistakes = Mistakes()
    if IMAGE in kinds:
        mistakes.add(f"{IMAGE!r} is the name of the images, and of no label", label=IMAGE)
    sheets = _sheets(settings, kinds, mistakes)
    mistakes.check()
    division = _division(sheets, settings, mistakes)
    mistakes.check()
    values = {place: _coded(sheet, settings, kinds, mistakes) for place, sheet in sheets.items()}
    place, rows = division["train"]
    languages = learn_languages(str(sheets[place].file), values[place], rows, kinds, mistakes)
    for place, sheet in sheets.items():
        check_cells(sheet.where, values[place], languages, mistakes)
    mistakes.check()
    files = [IMAGE, *(label for label, kind in kinds.items() if kind in FILE_KINDS)]
    parts = {
        split: _part(sheets[place], rows, settings, files, values[place]) for split, (place, rows) in division.items()
    }
    return Tables(parts, languages)


def _sheets(settings: TableData, kinds: Mapping[str, LabelKind], mistakes: Mistakes) -> dict[str, Sheet]:
    """The tables, by the place that is written in the settings; each is read once."""
    wanted: dict[str, str | None] = {**dict.fromkeys(kinds), **_other_columns(settings)}
    places = dict.fromkeys(settings.places.values())
    read = {place: read_sheet(Path(place).expanduser(), wanted, mistakes) for place in places}
    return {place: sheet for place, sheet in read.items() if sheet is not None}


def _division(
    sheets: Mapping[str, Sheet], settings: TableData, mistakes: Mistakes
) -> dict[str, tuple[str, NDArray[np.int64]]]:
    """Of each split, the place of its table, and the rows."""
    places = settings.places.items()
    if settings.split is None:
        return {split: (place, np.arange(len(sheets[place].places), dtype=np.int64)) for split, place in places}
    sheet, split = sheets[settings.train], settings.split
    column = settings.image if split.by == "hash" else split.column_name
    rows_of = divide(split, sheet.cells[column], str(sheet.file), sheet.where, mistakes)
    return {split: (settings.train, rows) for split, rows in rows_of.items()}


def _other_columns(settings: TableData) -> dict[str, str]:
    """The columns that are no labels, with the key that names each."""
    names = {settings.image: "data.image"}
    if settings.split is not None and settings.split.by == "column":
        names[settings.split.column_name] = "data.split.column"
    return names


def _coded(sheet: Sheet, settings: TableData, kinds: Mapping[str, LabelKind], mistakes: Mistakes) -> dict[str, Coded]:
    """The columns of labels that lie in the table; the paths of the others are checked."""
    images = sheet.cells[settings.image]
    for row in [] if all(images) else [row for row, path in enumerate(images) if not path]:
        mistakes.add(f"{sheet.where(row)}: {settings.image}: expected the path of an image, got an empty cell")
    for column in [settings.image, *(label for label, kind in kinds.items() if kind in FILE_KINDS)]:
        for row, what in wrong_paths(sheet.cells[column], settings.outside):
            mistakes.add(f"{sheet.where(row)}: {column}: {what}")
    return {label: Coded.of(sheet.cells[label]) for label, kind in kinds.items() if kind not in FILE_KINDS}


def _part(
    sheet: Sheet, rows: NDArray[np.int64], settings: TableData, files: Sequence[str], values: Mapping[str, Coded]
) -> TableRows:
    def of(column: str) -> Sequence[str]:
        cells = sheet.cells[column]
        return cells if len(rows) == len(cells) else [cells[row] for row in rows.tolist()]

    paths = {name: of(settings.image if name == IMAGE else name) for name in files}
    own = {label: column.take(rows) for label, column in values.items()}
    return TableRows(sheet.file, sheet.unit, sheet.places[rows], paths, own)
