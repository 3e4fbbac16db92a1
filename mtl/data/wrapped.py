"""A split around another one, which it hands out with other labels."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from mtl.data.augment import View
from mtl.data.dataset import Rows, Split
from mtl.data.orders import Order


class WrappedSplit(Split):
    """Another split. A subclass overrides what it changes; all else is as the other split has it.

    `batch` is made of the own `rows`, and not of the other split's batch.
    """

    def __init__(self, split: Split) -> None:
        self._split = split
        self.num_skipped, self.is_in_memory = split.num_skipped, split.is_in_memory

    @property
    def size(self) -> tuple[int, int]:
        return self._split.size

    @property
    def channels(self) -> int:
        return self._split.channels

    def __len__(self) -> int:
        return len(self._split)

    def order(self, tasks: Collection[str]) -> Order:
        return self._split.order(tasks)

    def examples(self, num: int) -> Tensor:
        return self._split.examples(num)

    def begin_phase(self, tasks: Collection[str]) -> None:
        self._split.begin_phase(tasks)

    def rows(self, indices: Tensor, with_images: bool, view: View | None = None) -> Rows:
        return self._split.rows(indices, with_images, view)

    def label_bytes(self) -> int | None:
        return self._split.label_bytes()

    @property
    def may_lack(self) -> bool:
        return self._split.may_lack

    def labels_to_fit(self, task: str) -> Tensor:
        return self._split.labels_to_fit(task)

    def identity(self) -> str | None:
        return self._split.identity()

    def label_identity(self, task: str) -> str | None:
        return self._split.label_identity(task)
