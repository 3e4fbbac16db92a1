"""A split whose samples are read from files when a batch needs them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from mtl.data.augment import View
from mtl.data.cache import DataError
from mtl.data.dataset import Rows, Split
from mtl.data.fileset import IMAGE
from mtl.data.items import ItemReader, Sample
from mtl.data.labelling import Labelling
from mtl.runtime.fingerprint import fingerprint, fingerprint_of_json
from mtl.tasks.base import SPATIAL

# Labels that lie in files are fitted on those of about this many images.
_NUM_FITTED = 256


class FileSplit(Split):
    """Images and labels in files, in the form in which `ItemReader` reads them."""

    is_in_memory = False

    def __init__(self, reader: ItemReader, labelling: Labelling, items: Tensor, num_skipped: int) -> None:
        """Args:
        reader: Reads the samples.
        labelling: Makes labels of tasks of them.
        items: "n", int64, which of the data set's items they are.
        num_skipped: Samples that were left out, since they cannot be read or trained on.
        """
        self._reader, self._labelling, self._items = reader, labelling, items
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
        others = [name for name in self._labelling.tasks if name not in labels]
        if not others and not with_images:
            return Rows(labels, None)
        samples = list[Sample]()
        for index in indices.tolist():
            try:
                samples.append(self._read(index, others, with_images, view))
            except DataError as error:
                # As text: an exception of a worker would arrive with its traceback in the message.
                return Rows({}, None, str(error))
        labels |= {name: torch.stack([each.labels[name] for each in samples]) for name in others}
        images = [each.image for each in samples if each.image is not None]
        in_order = {name: labels[name] for name in self._labelling.tasks}
        return Rows(in_order, torch.stack(images).permute(0, 2, 3, 1).contiguous() if with_images else None)

    def labels_to_fit(self, task: str) -> Tensor:
        if task in self._columns:
            return self._columns[task]
        label, found = self._labelling.label_of[task], list[Tensor]()
        for index in range(0, len(self), max(1, len(self) // _NUM_FITTED)):
            item = int(self._items[index])
            labels = self._reader.read(item, [label], with_image=False, seed=None).labels
            found.append(self._labelling.of_task(task, labels.get(label), self._reader.where(item)))
        return torch.stack(found)

    def identity(self) -> str | None:
        return self._digest(IMAGE)

    def label_identity(self, task: str) -> str | None:
        return self._digest(self._labelling.label_of[task])

    @cached_property
    def _columns(self) -> dict[str, Tensor]:
        """The labels of all samples, by task, of tasks whose labels take no reading; all are checked here, at once."""
        found = dict[str, Tensor]()
        for name, label in self._labelling.label_of.items():
            column = None if self._reader.kinds[label] in SPATIAL else self._reader.items.column(label)
            if column is not None:
                found[name] = self._labelling.of_column(name, column[self._items], self._where)
        return found

    def _read(self, index: int, tasks: Sequence[str], with_image: bool, view: View | None) -> Sample:
        item = int(self._items[index])
        seed = None if view is None else view.seed_of(index)
        sample = self._reader.read(item, self._labelling.names(tasks), with_image, seed)
        return Sample(sample.image, self._labelling.of(sample.labels, self._reader.where(item), tasks))

    def _digest(self, name: str) -> str | None:
        if name not in self._digests:
            own = self._reader.items.identity(self._items.tolist(), name)
            parts = [own, fingerprint(self._items), self._reader.describe()]
            self._digests[name] = None if own is None else fingerprint_of_json(parts)
        return self._digests[name]

    def _where(self, index: int) -> str:
        return self._reader.where(int(self._items[index]))
