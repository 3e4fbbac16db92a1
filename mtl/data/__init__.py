"""Data sets: generated ones, and those that are read from files; splits and batches of them."""

from __future__ import annotations

from collections.abc import Sequence

from mtl.config import DataConfig, DistillConfig, FileData, GeneratedData, RunConfig, SettingError
from mtl.config.mixed import MixedData
from mtl.data.augment import View, draw_view
from mtl.data.cache import DataError
from mtl.data.dataset import Batch, Split
from mtl.data.files.file_source import FileSource, labels_there
from mtl.data.files.mistakes import LabelError
from mtl.data.generated.generated_source import BUILT_IN, GeneratedSource, check_room
from mtl.data.generated.stored_split import StoredSplit
from mtl.data.loading import (
    IN_THREAD,
    Loading,
    batches_of,
    training_batches,
    validation_batches,
    validation_rounds,
    windows,
)
from mtl.data.memory import MemorySplit
from mtl.data.mixed import MixedSource, check_rooms
from mtl.data.orders import Mixed, Order, Shuffled
from mtl.data.room import check_image
from mtl.data.source import Source
from mtl.data.split_workers import SplitWorkers
from mtl.data.taught import TaughtSplit, Teaching
from mtl.tasks import label_kinds, labels_of

__all__ = [
    "BUILT_IN",
    "IN_THREAD",
    "Batch",
    "DataError",
    "LabelError",
    "Loading",
    "MemorySplit",
    "Mixed",
    "MixedSource",
    "Order",
    "Shuffled",
    "Source",
    "Split",
    "SplitWorkers",
    "StoredSplit",
    "TaughtSplit",
    "Teaching",
    "View",
    "batches_of",
    "check_image",
    "check_room",
    "check_rooms",
    "draw_view",
    "open_data",
    "training_batches",
    "validation_batches",
    "validation_rounds",
    "windows",
]


def open_data(config: RunConfig) -> Source:
    """Opens the data set of a run.

    Raises:
        SettingError: It cannot be had.
        ConfigError: A task type cannot be had.
        DataError: Something of it cannot be read; `LabelError` if it lacks a label that tasks learn.
    """
    chosen = {task: own.data for task, own in config.tasks.items() if own.data is not None}
    if not isinstance(config.data, MixedData):
        for task in chosen:
            raise SettingError(
                f"tasks.{task}.data", "chooses among the sets of data.name: mixed; there is one data set"
            )
        return _open_one(config.data, config, list(config.tasks))
    each = config.data.each
    label_of = labels_of(config)
    has_teachers = any(isinstance(own, DistillConfig) for own in config.tasks.values())
    return MixedSource(
        config.data, label_of, chosen, has_teachers, lambda name, tasks: _open_one(each[name], config, tasks)
    )


def _open_one(data: DataConfig, config: RunConfig, tasks: Sequence[str]) -> Source:
    """Opens one data set for the tasks that may learn from it."""
    own = {task: config.tasks[task] for task in tasks}
    if data is not config.data and (there := labels_there(data)) is not None:
        # Of several data sets, one need not have the labels of tasks that do not name it.
        own = {task: each for task, each in own.items() if each.data is not None or (each.label or task) in there}
    kinds = label_kinds(config.with_changes(tasks=own))
    if isinstance(data, GeneratedData):
        return GeneratedSource(data, kinds)
    assert isinstance(data, FileData)
    return FileSource(data, kinds)
