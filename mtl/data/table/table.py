"""The data set of a table: a row for each image, a column for each label."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtl.config import SettingError
from mtl.config.file_data import SplitName, TableData
from mtl.data.cache import DataError
from mtl.data.fileset import IMAGE, FileSet
from mtl.data.label_files import read_label
from mtl.data.paths import path_in
from mtl.data.reading import read_image
from mtl.data.table.rows import Tables, read_tables
from mtl.tasks.base import LabelKind


class Table(FileSet):
    """One split of a table, or of several."""

    def __init__(
        self,
        settings: TableData,
        split: SplitName,
        kinds: Mapping[str, LabelKind],
        tables: Tables | None = None,
    ) -> None:
        """Reads the tables, unless they are given.

        Args:
            settings: Where they are.
            split: Which split.
            kinds: What each label is, by column; other columns are not read.
            tables: What `read_tables` returned, so that several splits read the files once.

        Raises:
            DataError, SettingError: As `read_tables`; there is no such split.
        """
        tables = tables or read_tables(settings, kinds)
        if split not in tables.parts:
            raise SettingError(f"data.{split}", "this split is required here")
        self.labels = tuple(kinds)
        self.classes = {name: language.classes for name, language in tables.languages.items() if language.classes}
        self._kinds, self._languages, self._part = dict(kinds), tables.languages, tables.parts[split]
        self._root = f"{self._part.file.parent}{os.sep}"
        self._folder, self._outside, self._scale = self._part.file.parent, settings.outside, settings.scale

    def __len__(self) -> int:
        return len(self._part.places)

    def read(self, index: int, names: Collection[str]) -> dict[str, Any]:
        item: dict[str, Tensor] = {}
        for name in names:
            label = self._value(index, name) if name in self._part.values else self._from_file(index, name)
            if label is not None:
                item[name] = label
        return item

    def files(self, index: int) -> Mapping[str, Path]:
        return {name: self._path(index, name, paths[index]) for name, paths in self._part.paths.items() if paths[index]}

    def column(self, label: str) -> Tensor | None:
        column = self._part.values.get(label)
        if column is None:
            return None
        language = self._languages[label]
        if (quick := language.parse_all(column.cells)) is not None:
            return torch.from_numpy(np.array(quick)[column.codes])
        values = np.full((len(column.cells), *language.shape), np.nan)
        for code, cell in enumerate(column.cells):
            if cell:
                values[code] = language.parse(cell)
        return torch.from_numpy(values[column.codes])

    def path(self, index: int, name: str) -> str | None:
        # Of a million rows, in a tenth of the time of `files`: whether a link leads out is seen when a file is read.
        paths = self._part.paths.get(name)
        return f"{self._root}{paths[index]}" if paths is not None and paths[index] else None

    def where(self, index: int) -> str:
        return self._part.where(index)

    def _value(self, index: int, name: str) -> Tensor | None:
        """A label that lies in the table; None if it is missing."""
        column = self._part.values[name]
        if not (cell := column.cells[column.codes[index]]):
            return None
        value = torch.tensor(self._languages[name].parse(cell), dtype=torch.float64)
        if bool(value.isnan().all()) and value.numel():
            return None
        return value.long() if self._kinds[name] == "class" else value.float()

    def _from_file(self, index: int, name: str) -> Tensor | None:
        """The image, or a label that lies in a file; None if it is missing."""
        if not (path := self._part.paths[name][index]):
            return None
        file = self._path(index, name, path)
        try:
            if name == IMAGE:
                return read_image(file)
            return read_label(self._kinds[name], file, self._scale.get(name, 1.0))
        except DataError as error:
            raise DataError(f"{self.where(index)}: {name}: {error}") from error

    def _path(self, index: int, name: str, path: str) -> Path:
        try:
            return path_in(self._folder, path, self._outside)
        except DataError as error:
            raise DataError(f"{self.where(index)}: {name}: {error}") from error
