"""Reads the columns of a table as text: CSV here, Parquet by `mtl.data.files.table.parquet`."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, compress, islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

import numpy as np
from numpy.typing import NDArray

from mtl.data.files.mistakes import Mistakes
from mtl.data.files.table.parquet import is_parquet, parquet_columns, read_parquet
from mtl.runtime.text import count, shorten

if TYPE_CHECKING:
    from _csv import Reader as _Rows

_ROWS_AT_ONCE = 1 << 12
# After the last line of a file: a row of its own, unless a quote is still open; then it is one cell, or a part of one.
_END = ["\0end", "\0end"]


@dataclass(frozen=True)
class Sheet:
    """Some columns of a table.

    Attributes:
        file: Where they were read.
        cells: The text of each cell without the spaces around it, by column.
        places: "n", int64, the number of each row in the file, from 1: of a CSV, of the line where it begins.
        unit: What these numbers count.
    """

    file: Path
    cells: Mapping[str, Sequence[str]]
    places: NDArray[np.int64]
    unit: Literal["line", "row"]

    def where(self, row: int) -> str:
        """A row as messages name it."""
        return f"{self.file}, {self.unit} {self.places[row]}"


def column_names(file: Path) -> tuple[str, ...]:
    """The names of a table's columns.

    Raises:
        DataError: It cannot be read.
        SettingError: It is Parquet, and pyarrow is not installed.
    """
    mistakes = Mistakes()
    names = _columns(file, mistakes)
    mistakes.check()
    assert names is not None
    return names


def read_sheet(file: Path, wanted: Mapping[str, str | None], mistakes: Mistakes) -> Sheet | None:
    """Reads columns of a table.

    Args:
        file: CSV in UTF-8 with a header, or Parquet.
        wanted: The columns, each with the key that names it; None for a label.
        mistakes: Receives what is wrong with the file.

    Returns:
        None if there are mistakes.

    Raises:
        SettingError: The file is Parquet, and pyarrow is not installed.
    """
    before = len(mistakes)
    names = _columns(file, mistakes)
    if names is None:
        return None
    for name, key in wanted.items():
        if name not in names:
            start, label = ("", name) if key is None else (f"{key}: ", None)
            mistakes.add(f"{start}{file} has no column {name!r}", name, filter(None, names), label)
    if len(mistakes) > before:
        return None
    if is_parquet(file):
        cells = read_parquet(file, list(wanted), mistakes)
        places = np.arange(1, 1 + len(next(iter(cells.values()), ())), dtype=np.int64)
    else:
        cells, places = _read_csv(file, len(names), {name: names.index(name) for name in wanted}, mistakes)
    if len(mistakes) > before:
        return None
    if not len(places):
        mistakes.add(f"{file}: expected at least one row below the names of the columns, got none")
        return None
    return Sheet(file, cells, places, "row" if is_parquet(file) else "line")


def _columns(file: Path, mistakes: Mistakes) -> tuple[str, ...] | None:
    names: tuple[str, ...] = ()
    if is_parquet(file):
        names = parquet_columns(file, mistakes)
    else:
        with _errors_as_mistakes(file, mistakes), _open(file) as stream:
            header: list[str] = next(filter(None, _reader(stream)), [])
            names = () if header == _END else tuple(map(str.strip, header))
            if not names:
                mistakes.add(f"{file}: expected a line with the names of the columns, got an empty file")
    twice = [repr(name) for name, number in Counter(names).items() if name and number > 1]
    if twice:
        mistakes.add(f"{file}: several columns have the name {shorten(twice, 5)}")
    return None if twice or not names else names


def _open(file: Path) -> TextIO:
    return file.open(encoding="utf-8-sig", newline="")


def _reader(stream: Iterable[str]) -> _Rows:
    """The rows of a CSV as text, and one of `_END`; not strict, which would refuse a space after a quoted cell."""
    return csv.reader(chain(stream, [",".join(_END)]), skipinitialspace=True)


@contextmanager
def _errors_as_mistakes(file: Path, mistakes: Mistakes) -> Iterator[None]:
    """Adds an error of a CSV to the mistakes."""
    try:
        yield
    except OSError as error:
        mistakes.add(f"{file}: {error.strerror}")
    except UnicodeError:
        mistakes.add(f"{file}, line {_line_of_wrong_byte(file)}: expected text in UTF-8")
    except csv.Error as error:
        mistakes.add(f"{file}: {error}")


def _line_of_wrong_byte(file: Path) -> int:
    content = file.read_bytes()
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return 1 + content.count(b"\n", 0, error.start)
    return 1


def _read_csv(
    file: Path, width: int, column_of: Mapping[str, int], mistakes: Mistakes
) -> tuple[dict[str, list[str]], NDArray[np.int64]]:
    """The wanted columns, and the line where each row begins; blank lines are no rows."""
    cells: dict[str, list[str]] = {name: [] for name in column_of}
    places = [np.zeros(0, np.int64)]
    with _errors_as_mistakes(file, mistakes), _open(file) as stream:
        for part, lines in _parts(_reader(stream), mistakes, file):
            if set(map(len, part)) != {width}:
                part, lines = _of_width(part, lines, width, mistakes, file)
            columns = list(zip(*part, strict=True))
            for name, column in column_of.items():
                cells[name].extend(map(str.strip, columns[column]) if columns else ())
            places.append(lines)
    # The first row has the names.
    return {name: column[1:] for name, column in cells.items()}, np.concatenate(places)[1:]


def _parts(rows: _Rows, mistakes: Mistakes, file: Path) -> Iterator[tuple[list[list[str]], NDArray[np.int64]]]:
    """Some rows at a time and the lines where they begin, without `_END`."""
    line, following = 1, list(islice(rows, _ROWS_AT_ONCE))
    while following:
        part, end = following, rows.line_num + 1
        if end - line == len(part):
            lines = np.arange(line, end, dtype=np.int64)
        else:
            lines = np.cumsum([line, *(1 + sum(map(_num_breaks, row)) for row in part[:-1])], dtype=np.int64)
        line, following = end, list(islice(rows, _ROWS_AT_ONCE))
        if not following:
            if part.pop() != _END:
                mistakes.add(f"{file}, line {lines[-1]}: the row has a quote that is never closed")
            lines = lines[:-1]
        yield part, lines


def _num_breaks(cell: str) -> int:
    return cell.count("\n") + cell.count("\r") - cell.count("\r\n")


def _of_width(
    part: Sequence[list[str]], lines: NDArray[np.int64], width: int, mistakes: Mistakes, file: Path
) -> tuple[list[list[str]], NDArray[np.int64]]:
    """The rows that have a cell for each column; others are mistakes, unless they are blank."""
    for row, line in zip(part, lines, strict=True):
        if row and len(row) != width:
            mistakes.add(f"{file}, line {line}: expected {count(width, 'cell')}, one for each column, got {len(row)}")
    fits = [len(row) == width for row in part]
    return list(compress(part, fits)), lines[fits]
