"""Divides the rows of one table into splits: by a column of its own, or by a draw that a row's name decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat

import numpy as np
import xxhash
from numpy.typing import NDArray

from mtl.config.file_data import SPLITS, SplitConfig
from mtl.data.files.mistakes import Mistakes
from mtl.data.files.table.coded import Coded

# Of `split: {by: hash}`: another one would be another split.
_HASH_SEED = 20_240


def divide(
    split: SplitConfig, cells: Sequence[str], place: str, where: Callable[[int], str], mistakes: Mistakes
) -> dict[str, NDArray[np.int64]]:
    """The rows of each split of one table.

    Args:
        split: How it is divided.
        cells: With `by: hash` what is drawn by, such as paths; else the cells of the column.
        place: Where the table is, as messages name it.
        where: A row as messages name it.
        mistakes: Receives what is wrong.
    """
    if split.by == "hash":
        hashes = map(xxhash.xxh3_64_intdigest, map(str.encode, cells), repeat(_HASH_SEED))
        drawn = np.fromiter(hashes, np.uint64, len(cells)) / 2.0**64
        val, test = split.val or 0.0, split.test or 0.0
        number = np.where(drawn < val, 1, np.where(drawn < val + test, 2, 0))
        expected = ["train", "val", *(["test"] if test else [])]
    else:
        column = Coded.of(cells)
        for code, cell in enumerate(column.cells):
            if cell not in SPLITS:
                what = f"expected train, val or test, got {cell!r}"
                column.add_mistake(mistakes, where, code, what, split.column_name, cell, SPLITS)
        number = np.array([SPLITS.index(cell) if cell in SPLITS else -1 for cell in column.cells])[column.codes]
        expected = ["train", "val"]
    rows: dict[str, NDArray[np.int64]] = {name: np.flatnonzero(number == n) for n, name in enumerate(SPLITS)}
    for name in expected:
        if not len(rows[name]):
            mistakes.add(f"{place}: no row is in the split {name!r}")
    return {name: found for name, found in rows.items() if len(found) or name in expected}
