"""Reads a whole split into memory, once, when a run begins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from mtl.data.cache import DataError
from mtl.data.files.items import Sample
from mtl.data.files.mistakes import Mistakes
from mtl.data.files.samples import SampleReader
from mtl.data.memory import MemorySplit
from mtl.data.workers import ahead, read_by_workers
from mtl.runtime.console import logger
from mtl.runtime.text import shorten

_Read = tuple[int, Sample | DataError]


def read_into_memory(reader: SampleReader, num: int, num_workers: int, skips: bool, quiet: bool) -> MemorySplit:
    """Images and labels of the first items of a data set.

    Args:
        reader: Reads the samples.
        num: How many.
        num_workers: Processes that read them; 0 reads them here.
        skips: Whether samples that cannot be read are left out.
        quiet: Whether to show no progress bar.

    Raises:
        DataError: Samples cannot be read, and are not to be left out, or none can be; all of them are named, or the
            first ones of many.
    """
    form = reader.form
    images = torch.zeros((num, *form.size, form.channels), dtype=form.dtype)
    labels = {name: reader.empty(name, num) for name in reader.tasks}
    faults: dict[int, str] = {}
    for index, sample in _samples(reader, num, num_workers, quiet):
        if isinstance(sample, DataError):
            faults[index] = str(sample)
            continue
        assert sample.image is not None
        images[index] = sample.image.permute(1, 2, 0)
        for name, label in sample.labels.items():
            labels[name][index] = label
    bad = _left_out(faults, reader, num, skips)
    split = MemorySplit(images, labels)
    return (split.without(bad) if faults else split).knowing(reader.tasks)


def sound_items(reader: SampleReader, num: int, num_workers: int, quiet: bool) -> Tensor:
    """Which of the first items of a data set can be read and trained on, "n", int64: each is read once.

    Args: as for `read_into_memory`.

    Raises:
        DataError: None of them can.
    """
    samples = _samples(reader, num, num_workers, quiet)
    faults = {index: str(sample) for index, sample in samples if isinstance(sample, DataError)}
    return (~_left_out(faults, reader, num, skips=True)).nonzero().flatten()


def _left_out(faults: Mapping[int, str], reader: SampleReader, num: int, skips: bool) -> Tensor:
    """The samples that cannot be read, "n", bool; a warning says how many there are."""
    bad, mistakes = torch.zeros(num, dtype=torch.bool), Mistakes()
    for fault in faults.values():
        mistakes.add(fault)
    if faults and not skips:
        raise DataError(f"{mistakes}; data.on_bad_sample=skip leaves such samples out")
    if len(faults) == num:
        raise DataError(f"{reader.place}: no sample can be read: {mistakes}")
    if faults:
        listed = shorten(list(faults.values()), 5)
        logger.warning(f"{reader.place}: {len(faults)} of {num} samples are left out: {listed}")
        bad[list(faults)] = True
    return bad


class _IndexedSamples(Dataset[_Read]):
    """Single samples with their index; one that cannot be read is the error that says so, whole across processes."""

    def __init__(self, reader: SampleReader, num: int) -> None:
        self._reader, self._num = reader, num

    def __len__(self) -> int:
        return self._num

    def __getitems__(self, indices: list[int]) -> _Read:
        (index,) = indices
        try:
            return index, self._reader.read(index, with_image=True)
        except DataError as error:
            return index, error


def _samples(reader: SampleReader, num: int, num_workers: int, quiet: bool) -> Iterator[_Read]:
    """All samples in their order, with a bar if it takes longer than a second."""
    items, batches = _IndexedSamples(reader, num), [[index] for index in range(num)]
    with tqdm(total=num, desc=f"{reader.place}: reading", disable=quiet or None, delay=1, leave=False) as bar:
        if not num_workers:
            for batch in batches:
                yield items.__getitems__(batch)
                bar.update()
            return
        with closing(read_by_workers(items, batches, min(num_workers, num))) as read:
            for sample in ahead(read):
                yield sample
                bar.update()
