"""Columns of cells: each different one is parsed once, and checked before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtl.data.files.mistakes import Mistakes
from mtl.data.files.table.cells import CellError, Language, language_of
from mtl.runtime.text import count
from mtl.tasks.base import LabelKind

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

    def take(self, rows: NDArray[np.int64]) -> Coded:
        """The column of some rows."""
        return Coded(self.codes[rows], self.cells)

    def value(self, row: int, language: Language, kind: LabelKind) -> Tensor | None:
        """The label of a row; None if it is missing."""
        if not (cell := self.cells[self.codes[row]]):
            return None
        value = torch.tensor(language.parse(cell), dtype=torch.float64)
        if bool(value.isnan().all()) and value.numel():
            return None
        return value.long() if kind == "class" else value.float()

    def values(self, language: Language) -> Tensor:
        """The labels of all rows, first axis n, float64; NaN where one is missing."""
        if (quick := language.parse_all(self.cells)) is not None:
            return torch.from_numpy(np.array(quick)[self.codes])
        values = np.full((len(self.cells), *language.shape), np.nan)
        for code, cell in enumerate(self.cells):
            if cell:
                values[code] = language.parse(cell)
        return torch.from_numpy(values[self.codes])

    def add_mistake(
        self,
        mistakes: Mistakes,
        where: Callable[[int], str],
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
        rows = np.flatnonzero(self.codes == code)
        more = f" (and in {count(len(rows) - 1, 'more row')})" if len(rows) > 1 else ""
        mistakes.add(f"{where(int(rows[0]))}: {name}: {message}{more}", word, choices)


def learn_languages(
    place: str,
    values: Mapping[str, Coded],
    rows: NDArray[np.int64],
    kinds: Mapping[str, LabelKind],
    mistakes: Mistakes,
    known: Mapping[str, Language] | None = None,
) -> dict[str, Language]:
    """The language of each label whose training cells have one.

    Args:
        place: Where the cells are, as messages name it.
        values: The columns.
        rows: Those of the training split.
        kinds: What each label is.
        mistakes: Receives what is wrong.
        known: The languages of columns whose cells need not tell.
    """
    languages = dict(known or {})
    for label, column in values.items():
        if next(column.of_rows(rows), None) is None:
            mistakes.add(f"{place}: {label}: no row of the training split has a label")
        elif label not in languages:
            try:
                languages[label] = language_of(kinds[label], column.of_rows(rows))
            except CellError as error:
                mistakes.add(f"{place}: {label}: {error}")
    return languages


def check_cells(
    where: Callable[[int], str], values: Mapping[str, Coded], languages: Mapping[str, Language], mistakes: Mistakes
) -> None:
    """Notes every cell that is not of its label's language."""
    for label, language in languages.items():
        column = values[label]
        for code, cell in enumerate(column.cells if language.parse_all(column.cells) is None else ()):
            try:
                if cell:
                    language.parse(cell)
            except CellError as error:
                column.add_mistake(mistakes, where, code, str(error), label, error.word, language.classes)
