"""A split whose samples are read from files when a batch needs them."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from mtl.data.augment import View
from mtl.data.cache import DataError
from mtl.data.dataset import Rows, Split, lacking
from mtl.data.files.fileset import IMAGE
from mtl.data.files.items import Sample
from mtl.data.files.samples import SampleReader

# Labels that lie in files are fitted on those of about this many images.
_NUM_FITTED = 256


class FileSplit(Split):
    """Images and labels in files, in the form in which `SampleReader` reads them."""

    is_in_memory = False

    def __init__(self, reader: SampleReader, items: Tensor, num_skipped: int) -> None:
        """Args:
        reader: Reads the samples.
        items: "n", int64, which of the data set's items they are.
        num_skipped: Samples that were left out, since they cannot be read or trained on.
        """
        self._reader, self._items = reader, items
        # By name; to ask for every file takes seconds where there are many.
        self._digests: dict[str, str | None] = {}
        self.num_skipped = num_skipped

    def __len__(self) -> int:
        return len(self._items)

    @property
    def size(self) -> tuple[int, int]:
        return self._reader.form.size

    @property
    def channels(self) -> int:
        return self._reader.form.channels

    def rows(self, indices: Tensor, with_images: bool, view: View | None = None) -> Rows:
        labels = {name: column[indices] for name, column in self._columns.items()}
        others = [name for name in self._reader.tasks if name not in labels]
        if not others and not with_images:
            return Rows(labels, None, lacking(labels, self._reader.tasks))
        samples = list[Sample]()
        for index in indices.tolist():
            seed = None if view is None else view.seed_of(index)
            try:
                samples.append(self._reader.read(int(self._items[index]), with_images, seed, others))
            except DataError as error:
                # As text: an exception of a worker would arrive with its traceback in the message.
                return Rows({}, None, fault=str(error))
        labels |= {name: torch.stack([each.labels[name] for each in samples]) for name in others}
        images = [each.image for each in samples if each.image is not None]
        in_order = {name: labels[name] for name in self._reader.tasks}
        stacked = torch.stack(images).permute(0, 2, 3, 1).contiguous() if with_images else None
        return Rows(in_order, stacked, lacking(labels, self._reader.tasks))

    def labels_to_fit(self, task: str) -> Tensor:
        if task in self._columns:
            return self._columns[task]
        items = self._items[:: max(1, len(self) // _NUM_FITTED)].tolist()
        return torch.stack([self._reader.read(item, with_image=False, tasks=[task]).labels[task] for item in items])

    def identity(self) -> str | None:
        return self._digest(IMAGE)

    def label_identity(self, task: str) -> str | None:
        return self._digest(self._reader.label_of[task])

    @cached_property
    def _columns(self) -> dict[str, Tensor]:
        """The labels of all samples, by task, of tasks whose labels take no reading; all are checked here, at once."""
        found = {name: self._reader.column(name, self._items) for name in self._reader.tasks}
        return {name: column for name, column in found.items() if column is not None}

    def _digest(self, name: str) -> str | None:
        if name not in self._digests:
            self._digests[name] = self._reader.identity(self._items, name)
        return self._digests[name]
