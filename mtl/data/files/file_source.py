"""A data set that is read from files: once into memory where it fits there, else batch by batch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property

import torch

from mtl.config import DataConfig, FileData, OwnData, SettingError
from mtl.config.file_data import CocoData, FolderData, SplitName, TableData
from mtl.config.hub_data import HuggingFaceData, WebDatasetData
from mtl.config.public_data import PublicDataConfig
from mtl.data.cache import DataError
from mtl.data.dataset import Batch, Split
from mtl.data.files.coco import Coco
from mtl.data.files.file_split import FileSplit
from mtl.data.files.fileset import FileSet
from mtl.data.files.folder import Folder
from mtl.data.files.hub import hub_columns, open_hub
from mtl.data.files.into_memory import read_into_memory, sound_items
from mtl.data.files.items import ImageForm, ItemReader, image_form
from mtl.data.files.own import OwnSet
from mtl.data.files.samples import SampleReader
from mtl.data.files.sets import public_set
from mtl.data.files.shards import open_shards
from mtl.data.files.table import Table, label_names, read_tables
from mtl.data.source import Source, pipelines_of
from mtl.data.transforms import Pipeline
from mtl.tasks import Task
from mtl.tasks.base import LabelKind


class FileSource(Source):
    """A data set in files.

    Attributes: as of every data set, and
        sets: Its training and its validation split, and its test split once that is loaded.
    """

    def __init__(self, config: FileData, kinds: Mapping[str, LabelKind]) -> None:
        self._config, self._kinds = config, kinds
        self.sets = open_file_sets(config, kinds, ("train", "val"))
        self.labels, self.classes = self.sets["train"].labels, self.sets["train"].classes
        self.num_images = (self._number("train"), self._number("val"))

    @property
    def channels(self) -> int:
        return self._form.channels

    def load_split(
        self, which: SplitName, tasks: Mapping[str, Task], label_of: Mapping[str, str], quiet: bool
    ) -> Split:
        config, skips = self._config, self._config.on_bad_sample == "skip"
        pipeline = pipelines_of(config)["train" if which == "train" else "val"]
        if which not in self.sets:
            self.sets |= open_file_sets(config, self._kinds, (which,))
        reader, num = self._reader(which, pipeline, tasks, label_of), self._number(which)
        if pipeline.is_random or num * _bytes_of_one(reader) > 1e9 * config.memory_gb:
            there = sound_items(reader, num, config.num_workers, quiet) if skips else torch.arange(num)
            return FileSplit(reader, there, num - len(there))
        return read_into_memory(reader, num, config.num_workers, skips, quiet)

    @cached_property
    def _form(self) -> ImageForm:
        try:
            return image_form(self.sets["train"], self._config.size)
        except DataError as error:
            raise DataError(f"{self._config.name}, train: {error}") from error

    def preview(self, tasks: Mapping[str, Task], label_of: Mapping[str, str], num: int) -> Batch:
        there = self.num_images[0]
        chosen = torch.linspace(0, there - 1, min(num, there)).long()
        reader = self._reader("train", pipelines_of(self._config)["val"], tasks, label_of)
        split = FileSplit(reader, chosen, 0)
        indices = torch.arange(len(split))
        return split.batch(indices, rows=split.rows(indices, with_images=True))

    def _reader(
        self, which: str, pipeline: Pipeline, tasks: Mapping[str, Task], label_of: Mapping[str, str]
    ) -> SampleReader:
        """The reader of a split's samples."""
        kinds = {label: self._kinds[label] for label in label_of.values()}
        items = ItemReader(self.sets[which], f"{self._config.name}, {which}", kinds, self._form, pipeline)
        return SampleReader(items, tasks, label_of, self._config.on_bad_sample == "skip")

    def _number(self, split: str) -> int:
        key, there = f"num_{split}", len(self.sets[split])
        asked = getattr(self._config, key, None)
        if there == 0:
            raise SettingError("data.name", f"{self._config.name} has no image in its split {split!r}")
        if asked is not None and asked > there:
            message = f"expected at most the {there} images of {self._config.name}'s split {split!r}, got {asked}"
            raise SettingError(f"data.{key}", message)
        return asked or there


def open_file_sets(config: FileData, kinds: Mapping[str, LabelKind], splits: Sequence[SplitName]) -> dict[str, FileSet]:
    """Splits of a data set in files; nothing but lists and tables is read.

    Args:
        config: Which data set.
        kinds: The kind of each label that tasks learn.
        splits: Which splits.

    Raises:
        SettingError: It cannot be had.
        DataError: Something of it cannot be read.
    """
    if isinstance(config, TableData):
        tables = read_tables(config, kinds)
        return {split: Table(config, split, kinds, tables) for split in splits}
    if isinstance(config, HuggingFaceData):
        return {**open_hub(config, kinds, splits)}
    if isinstance(config, WebDatasetData):
        return {**open_shards(config, kinds, splits)}
    return {split: _open_one(config, split, kinds) for split in splits}


def labels_there(config: DataConfig) -> Collection[str] | None:
    """The labels of a data set that refuses to be opened for others; None if it can be opened for any.

    Raises:
        DataError: It cannot be read.
        SettingError: It cannot be had.
    """
    if isinstance(config, HuggingFaceData):
        return hub_columns(config)
    return label_names(config) if isinstance(config, TableData) else None


def _open_one(config: FileData, split: SplitName, kinds: Mapping[str, LabelKind]) -> FileSet:
    match config:
        case OwnData():
            try:
                return OwnSet(config, split, kinds)
            except DataError as error:
                raise DataError(f"{config.name}, {split}: {error}") from error
        case FolderData():
            return Folder(config, split, kinds)
        case CocoData():
            return Coco(config, split, kinds)
        case PublicDataConfig():
            return public_set(config.name)(config, split, kinds)
        case _:
            raise TypeError(config)


def _bytes_of_one(reader: SampleReader) -> int:
    """The size of a sample in memory."""
    form, labels = reader.form, sum(reader.empty(name, 1).nbytes for name in reader.tasks)
    return form.size[0] * form.size[1] * form.channels * form.dtype.itemsize + labels
