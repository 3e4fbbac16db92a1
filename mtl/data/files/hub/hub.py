"""A data set of Hugging Face's `datasets`: a column of images, and a column for each label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtl.config.hub_data import HuggingFaceData
from mtl.data.cache import DataError
from mtl.data.files.blob import Blob, Readable
from mtl.data.files.fileset import IMAGE
from mtl.data.files.hub.parts import HubRows
from mtl.data.files.label_files import FILE_KINDS
from mtl.data.files.paths import path_in
from mtl.data.files.table.cells import Language
from mtl.data.files.table.coded import Coded
from mtl.data.files.table.records import RecordSet
from mtl.runtime.fingerprint import fingerprint_of_json
from mtl.tasks.base import LabelKind


class HubSet(RecordSet):
    """One split."""

    def __init__(
        self,
        settings: HuggingFaceData,
        part: HubRows,
        rows: NDArray[np.int64],
        kinds: Mapping[str, LabelKind],
        values: Mapping[str, Coded],
        languages: Mapping[str, Language],
        folders: Sequence[Path],
    ) -> None:
        """Args:
        settings: The data set.
        part: Where the rows are.
        rows: Which ones.
        kinds: What each label is.
        values: The labels that lie in cells, of these rows.
        languages: How these are parsed.
        folders: Where images that lie in files of their own may do so.
        """
        super().__init__(kinds, values, languages, settings.scale)
        self._part, self._rows = part, rows
        self._folders, self._outside = tuple(folders), settings.outside
        names = {IMAGE: settings.image, **{label: label for label, kind in kinds.items() if kind in FILE_KINDS}}
        dataset = part.dataset
        self._columns = {name: dataset.select_columns([column]).with_format("arrow") for name, column in names.items()}
        self._paths = {name: _paths(dataset, column) for name, column in names.items()}

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, index: int) -> str:
        return self._part.where(int(self._rows[index]))

    def source(self, index: int, name: str) -> Readable | None:
        import pyarrow

        column = self._columns[name][int(self._rows[index])].column(0).chunk(0)
        if column.null_count:
            return None
        if isinstance(column.type, pyarrow.ExtensionType):
            return Blob(name, np.array(column.to_numpy(zero_copy_only=False)[0]))
        value = column[0].as_py()
        if isinstance(value, bytes):
            return Blob(name, value)
        if value["bytes"] is not None:
            return Blob(value["path"] or name, value["bytes"])
        return None if value["path"] is None else self._file(value["path"])

    def files(self, index: int) -> Mapping[str, Path]:
        return {name: Path(path) for name in self._columns if (path := self.path(index, name)) is not None}

    def path(self, index: int, name: str) -> str | None:
        paths = self._paths.get(name)
        return None if paths is None else paths[int(self._rows[index])]

    def identity(self, items: Sequence[int], name: str = IMAGE) -> str | None:
        """A digest of the Arrow files, and of the files of images that lie in such."""
        if name in self._values:
            return super().identity(items, name)
        rows = self._rows[list(items)].tolist()
        files = super().identity(items, name) if self._paths.get(name) is not None else ""
        return fingerprint_of_json([self._part.digest, self._part.dataset.column_names, name, rows, files])

    def _file(self, path: str) -> Path:
        """A file of its own; raises `DataError` if it may not be read."""
        if "://" in path or "::" in path:
            raise DataError(f"{path}: expected a local file, or the bytes of one")
        if self._outside:
            return Path(path)
        for folder in self._folders:
            try:
                return path_in(folder.resolve(), str(Path(path).resolve()), outside=False)
            except DataError:
                continue
        raise DataError(f"{path}: lies outside of {self._folders[0]}; data.outside=true allows it")


def _paths(dataset: Any, column: str) -> list[str | None] | None:
    """The paths of images whose bytes are not in the data set; None if all are, or there are no paths."""
    import pyarrow
    import pyarrow.compute as compute

    stored = dataset.data.column(column)
    if not pyarrow.types.is_struct(stored.type):
        return None
    has_none = compute.is_null(compute.struct_field(stored, "bytes"))
    paths = compute.if_else(has_none, compute.struct_field(stored, "path"), None)
    return paths.to_pylist() if paths.null_count < len(paths) else None
