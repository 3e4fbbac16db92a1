"""A split whose rows have labels in cells, and an image and other labels in files or in parts of files."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from mtl.data.cache import DataError
from mtl.data.files.blob import Readable
from mtl.data.files.fileset import IMAGE, FileSet
from mtl.data.files.label_files import read_label
from mtl.data.files.reading import read_image
from mtl.data.files.table.cells import Language
from mtl.data.files.table.coded import Coded
from mtl.tasks.base import LabelKind


class RecordSet(FileSet):
    """The common part of tables, data sets of Hugging Face and shards."""

    def __init__(
        self,
        kinds: Mapping[str, LabelKind],
        values: Mapping[str, Coded],
        languages: Mapping[str, Language],
        scale: Mapping[str, float],
    ) -> None:
        """Args:
        kinds: What each label is.
        values: The labels that lie in cells.
        languages: How these are parsed.
        scale: Metres of one unit of a depth, by label; 1 if not given.
        """
        self.labels = tuple(kinds)
        self.classes = {name: language.classes for name, language in languages.items() if language.classes}
        self._kinds, self._values, self._languages, self._scale = dict(kinds), values, languages, scale

    @abstractmethod
    def where(self, index: int) -> str:
        """A row as messages name it."""

    @abstractmethod
    def source(self, index: int, name: str) -> Readable | None:
        """The image, or a label that lies in no cell; None if it is missing.

        Raises:
            DataError: It cannot be had; the message does not name the row.
        """

    def read(self, index: int, names: Collection[str]) -> dict[str, Any]:
        item: dict[str, Tensor] = {}
        for name in names:
            if (column := self._values.get(name)) is not None:
                label = column.value(index, self._languages[name], self._kinds[name])
            else:
                label = self._from_source(index, name)
            if label is not None:
                item[name] = label
        return item

    def column(self, label: str) -> Tensor | None:
        column = self._values.get(label)
        return None if column is None else column.values(self._languages[label])

    def _from_source(self, index: int, name: str) -> Tensor | None:
        try:
            if (file := self.source(index, name)) is None:
                return None
            return (
                read_image(file) if name == IMAGE else read_label(self._kinds[name], file, self._scale.get(name, 1.0))
            )
        except DataError as error:
            raise DataError(f"{self.where(index)}: {name}: {error}") from error
