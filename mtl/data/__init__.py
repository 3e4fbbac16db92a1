"""Data sets: generated ones, and those that are read from files; splits and batches of them."""

from __future__ import annotations

from collections.abc import Mapping

from mtl.config import DataConfig, FileData, GeneratedData
from mtl.data.augment import View, draw_view
from mtl.data.cache import DataError
from mtl.data.dataset import Batch, Split
from mtl.data.file_source import FileSource
from mtl.data.generated import BUILT_IN, GeneratedSource, check_room
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
from mtl.data.room import check_image
from mtl.data.samplers import num_batches
from mtl.data.source import Source
from mtl.data.taught import TaughtSplit, Teaching
from mtl.tasks.base import LabelKind

__all__ = [
    "BUILT_IN",
    "IN_THREAD",
    "Batch",
    "DataError",
    "Loading",
    "MemorySplit",
    "Source",
    "Split",
    "TaughtSplit",
    "Teaching",
    "View",
    "batches_of",
    "check_image",
    "check_room",
    "draw_view",
    "num_batches",
    "open_data",
    "training_batches",
    "validation_batches",
    "validation_rounds",
    "windows",
]


def open_data(config: DataConfig, kinds: Mapping[str, LabelKind]) -> Source:
    """Opens a data set.

    Args:
        config: Which one.
        kinds: The kind of each label that tasks learn.

    Raises:
        SettingError: It cannot be had.
        DataError: Something of it cannot be read.
    """
    if isinstance(config, GeneratedData):
        return GeneratedSource(config, kinds)
    assert isinstance(config, FileData)
    return FileSource(config, kinds)
