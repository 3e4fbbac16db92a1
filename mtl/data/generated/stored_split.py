"""A split of generated data that is larger than `data.memory_gb`: read from the data cache batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from mtl.data.augment import View
from mtl.data.cache import DataError
from mtl.data.dataset import Rows, Split, lacking
from mtl.data.generated.rows_file import RowsFile
from mtl.data.memory import Transform
from mtl.runtime.fingerprint import fingerprint_of_json, fingerprint_of_parts
from mtl.tasks import Task

# Constants are fitted on the labels of about this many images, as of data in files.
_NUM_FITTED = 256
_PART = 1024


class StoredSplit(Split):
    """Images and labels in a file of the data cache."""

    is_in_memory = False

    def __init__(
        self,
        file: RowsFile,
        tasks: Mapping[str, Task],
        label_of: Mapping[str, str],
        transform: Transform | None,
        items: Tensor | None = None,
    ) -> None:
        """Args:
        file: Holds `images` and the labels.
        tasks: The tasks by name.
        label_of: The name of each task's label.
        transform: Changes of each sample; random ones where it is seen in a view.
        items: "n", int64, which of the file's images they are; all if not given.
        """
        self._file, self._tasks, self._label_of, self._transform = file, tasks, label_of, transform
        num = file.shapes["images"][0]
        self._items = torch.arange(num) if items is None else items
        self.num_skipped = num - len(self._items)
        self._digests: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._items)

    @property
    def size(self) -> tuple[int, int]:
        return self._file.shapes["images"][1], self._file.shapes["images"][2]

    @property
    def channels(self) -> int:
        return self._file.shapes["images"][3]

    def label_parts(self, task: str) -> Iterator[Tensor]:
        """The labels of a task in their order, some images at a time."""
        return self._parts(self._label_of[task])

    def image_parts(self) -> Iterator[Tensor]:
        """The images in their order, some at a time."""
        return self._parts("images")

    def without(self, bad: Tensor) -> StoredSplit:
        """Leaves samples out.

        Args:
            bad: "n", bool.
        """
        return StoredSplit(self._file, self._tasks, self._label_of, self._transform, self._items[~bad])

    def rows(self, indices: Tensor, with_images: bool, view: View | None = None) -> Rows:
        items, own = self._items[indices], self._transform
        try:
            labels = {task: self._file.read(label, items) for task, label in self._label_of.items()}
            if own is not None and own.is_due(with_images, view):
                changed, labels = own(self._file.read("images", items), labels, indices, view)
                return Rows(labels, changed if with_images else None, lacking(labels, self._tasks))
            images = self._file.read("images", items) if with_images else None
        except OSError as error:
            return Rows({}, None, fault=f"the data cache cannot be read: {error.strerror}")
        return Rows(labels, images, lacking(labels, self._tasks))

    def labels_to_fit(self, task: str) -> Tensor:
        return self._read(self._label_of[task], self._items[:: max(1, len(self) // _NUM_FITTED)])

    def identity(self) -> str:
        own = self._digest("images")
        return own if self._transform is None else fingerprint_of_json([own, self._transform.pipeline.describe()])

    def label_identity(self, task: str) -> str:
        return self._digest(self._label_of[task])

    def _digest(self, name: str) -> str:
        if name not in self._digests:
            self._digests[name] = fingerprint_of_parts(self._parts(name), len(self))
        return self._digests[name]

    def _parts(self, name: str) -> Iterator[Tensor]:
        return (self._read(name, part) for part in torch.split(self._items, _PART))

    def _read(self, name: str, items: Tensor) -> Tensor:
        try:
            return self._file.read(name, items)
        except OSError as error:
            raise DataError(f"the data cache cannot be read: {error.strerror}") from error
