"""Reads the tables of a data set: the rows of each split, and how the cells of each label are parsed."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import compress, repeat
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from mtl.config.file_data import SPLITS, SplitConfig, TableData
from mtl.data.fileset import IMAGE
from mtl.data.label_files import FILE_KINDS, check_scale
from mtl.data.mistakes import Mistakes
from mtl.data.paths import wrong_paths
from mtl.data.table.cells import CellError, Language, language_of
from mtl.data.table.sheet import Sheet, column_names, read_sheet
from mtl.runtime.text import count
from mtl.tasks.base import LabelKind

# Of `split: {by: hash}`: another one would be another split.
_HASH_SEED = 20_240
# First cells of a column by which to say whether most are different.
_SAMPLE = 4096


@dataclass(frozen=True)
class Coded:
    """A column as numbers that stand for its cells.

    Attributes:
        codes: "n", int32, the place of each row's cell.
        cells: The different cells, in the order of their first rows; or all, if few are the same. An empty one is no
            label.
    """

    codes: NDArray[np.int32]
    cells: Sequence[str]

    @classmethod
    def of(cls, column: Sequence[str]) -> Coded:
        if len(set(column[:_SAMPLE])) > _SAMPLE // 2:
            return cls(np.arange(len(column), dtype=np.int32), column)
        place_of = {cell: place for place, cell in enumerate(dict.fromkeys(column))}
        codes = np.fromiter(map(place_of.__getitem__, column), np.int32, len(column))
        return cls(codes, list(place_of))

    def of_rows(self, rows: NDArray[np.int64]) -> Iterator[str]:
        """The cells of some rows that are not empty, each once if it is there once."""
        is_used = np.zeros(len(self.cells), np.bool_)
        is_used[self.codes[rows]] = True
        return filter(None, compress(self.cells, is_used.tolist()))


@dataclass(frozen=True)
class Part:
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
    """What is read of a data set's tables.

    Attributes:
        parts: The rows of each split there is.
        languages: How cells are parsed, by label.
    """

    parts: Mapping[str, Part]
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
    with _without_collector():
        return _read_tables(settings, kinds)


@contextmanager
def _without_collector() -> Iterator[None]:
    """The garbage collector would look through a million cells again and again, which takes as long as reading them."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


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
    languages = _learn(sheets[place], rows, values[place], kinds, mistakes)
    for place, sheet in sheets.items():
        _check_cells(sheet, values[place], languages, mistakes)
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
    rows_of = _divide(sheets[settings.train], settings, settings.split, mistakes)
    return {split: (settings.train, rows) for split, rows in rows_of.items()}


def _other_columns(settings: TableData) -> dict[str, str]:
    """The columns that are no labels, with the key that names each."""
    names = {settings.image: "data.image"}
    if settings.split is not None and settings.split.by == "column":
        names[settings.split.column_name] = "data.split.column"
    return names


def _divide(sheet: Sheet, settings: TableData, split: SplitConfig, mistakes: Mistakes) -> dict[str, NDArray[np.int64]]:
    """The rows of each split of one table."""
    if split.by == "hash":
        paths = sheet.cells[settings.image]
        hashes = map(xxhash.xxh3_64_intdigest, map(str.encode, paths), repeat(_HASH_SEED))
        drawn = np.fromiter(hashes, np.uint64, len(paths)) / 2.0**64
        val, test = split.val or 0.0, split.test or 0.0
        number = np.where(drawn < val, 1, np.where(drawn < val + test, 2, 0))
        expected = ["train", "val", *(["test"] if test else [])]
    else:
        column = Coded.of(sheet.cells[split.column_name])
        for code, cell in enumerate(column.cells):
            if cell not in SPLITS:
                what = f"expected train, val or test, got {cell!r}"
                _add(mistakes, sheet, column, code, what, split.column_name, cell, SPLITS)
        number = np.array([SPLITS.index(cell) if cell in SPLITS else -1 for cell in column.cells])[column.codes]
        expected = ["train", "val"]
    rows: dict[str, NDArray[np.int64]] = {name: np.flatnonzero(number == n) for n, name in enumerate(SPLITS)}
    for name in expected:
        if not len(rows[name]):
            mistakes.add(f"{sheet.file}: no row is in the split {name!r}")
    return {name: found for name, found in rows.items() if len(found) or name in expected}


def _coded(sheet: Sheet, settings: TableData, kinds: Mapping[str, LabelKind], mistakes: Mistakes) -> dict[str, Coded]:
    """The columns of labels that lie in the table; the paths of the others are checked."""
    images = sheet.cells[settings.image]
    for row in [] if all(images) else [row for row, path in enumerate(images) if not path]:
        mistakes.add(f"{sheet.where(row)}: {settings.image}: expected the path of an image, got an empty cell")
    for column in [settings.image, *(label for label, kind in kinds.items() if kind in FILE_KINDS)]:
        for row, what in wrong_paths(sheet.cells[column], settings.outside):
            mistakes.add(f"{sheet.where(row)}: {column}: {what}")
    return {label: Coded.of(sheet.cells[label]) for label, kind in kinds.items() if kind not in FILE_KINDS}


def _learn(
    sheet: Sheet,
    rows: NDArray[np.int64],
    values: Mapping[str, Coded],
    kinds: Mapping[str, LabelKind],
    mistakes: Mistakes,
) -> dict[str, Language]:
    """The language of each label whose training cells have one."""
    languages = {}
    for label, column in values.items():
        if next(column.of_rows(rows), None) is None:
            mistakes.add(f"{sheet.file}: {label}: no row of the training split has a label")
            continue
        try:
            languages[label] = language_of(kinds[label], column.of_rows(rows))
        except CellError as error:
            mistakes.add(f"{sheet.file}: {label}: {error}")
    return languages


def _check_cells(
    sheet: Sheet, values: Mapping[str, Coded], languages: Mapping[str, Language], mistakes: Mistakes
) -> None:
    for label, language in languages.items():
        column = values[label]
        for code, cell in enumerate(column.cells if language.parse_all(column.cells) is None else ()):
            try:
                if cell:
                    language.parse(cell)
            except CellError as error:
                _add(mistakes, sheet, column, code, str(error), label, error.word, language.classes)


def _add(
    mistakes: Mistakes,
    sheet: Sheet,
    column: Coded,
    code: int,
    message: str,
    name: str,
    word: str = "",
    choices: Sequence[str] = (),
) -> None:
    """Notes what is wrong with a cell, at the first row that has it."""
    if mistakes.is_full:
        mistakes.add("")
        return
    rows = np.flatnonzero(column.codes == code)
    more = f" (and in {count(len(rows) - 1, 'more row')})" if len(rows) > 1 else ""
    mistakes.add(f"{sheet.where(int(rows[0]))}: {name}: {message}{more}", word, choices)


def _part(
    sheet: Sheet, rows: NDArray[np.int64], settings: TableData, files: Sequence[str], values: Mapping[str, Coded]
) -> Part:
    def of(column: str) -> Sequence[str]:
        cells = sheet.cells[column]
        return cells if len(rows) == len(cells) else [cells[row] for row in rows.tolist()]

    paths = {name: of(settings.image if name == IMAGE else name) for name in files}
    own = {label: Coded(column.codes[rows], column.cells) for label, column in values.items()}
    return Part(sheet.file, sheet.unit, sheet.places[rows], paths, own)
