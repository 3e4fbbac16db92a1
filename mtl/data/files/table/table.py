"""The data set of a table: a row for each image, a column for each label."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from mtl.config import SettingError
from mtl.config.file_data import SplitName, TableData
from mtl.data.cache import DataError
from mtl.data.files.paths import path_in
from mtl.data.files.table.records import RecordSet
from mtl.data.files.table.rows import Tables, read_tables
from mtl.tasks.base import LabelKind


class Table(RecordSet):
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
        self._part = tables.parts[split]
        super().__init__(kinds, self._part.values, tables.languages, settings.scale)
        self._root = f"{self._part.file.parent}{os.sep}"
        self._folder, self._outside = self._part.file.parent, settings.outside

    def __len__(self) -> int:
        return len(self._part.places)

    def source(self, index: int, name: str) -> Path | None:
        path = self._part.paths[name][index]
        return path_in(self._folder, path, self._outside) if path else None

    def files(self, index: int) -> Mapping[str, Path]:
        return {name: self._path(index, name, paths[index]) for name, paths in self._part.paths.items() if paths[index]}

    def path(self, index: int, name: str) -> str | None:
        # Of a million rows, in a tenth of the time of `files`: whether a link leads out is seen when a file is read.
        paths = self._part.paths.get(name)
        return f"{self._root}{paths[index]}" if paths is not None and paths[index] else None

    def where(self, index: int) -> str:
        return self._part.where(index)

    def _path(self, index: int, name: str, path: str) -> Path:
        try:
            return path_in(self._folder, path, self._outside)
        except DataError as error:
            raise DataError(f"{self.where(index)}: {name}: {error}") from error
