"""A split whose classes are numbered otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mtl.data.augment import View
from mtl.data.dataset import Rows, Split
from mtl.data.wrapped import WrappedSplit


class RenumberedSplit(WrappedSplit):
    """Another split, with other numbers for the classes of some tasks."""

    def __init__(self, split: Split, numbers: Mapping[str, Sequence[int]]) -> None:
        """Args:
        split: The images and labels.
        numbers: By task, the new number of each class; labels that are no class stay as they are.
        """
        super().__init__(split)
        self._numbers = {name: torch.tensor(each) for name, each in numbers.items()}

    def rows(self, indices: Tensor, with_images: bool, view: View | None = None) -> Rows:
        rows = super().rows(indices, with_images, view)
        changed = {name: self._renumbered(name, rows.labels[name]) for name in self._numbers if name in rows.labels}
        return replace(rows, labels=rows.labels | changed)

    def _renumbered(self, name: str, label: Tensor) -> Tensor:
        numbers, wide = self._numbers[name], label.long()
        is_class = (wide >= 0) & (wide < len(numbers))
        return torch.where(is_class, numbers[wide.where(is_class, 0)], wide).to(label.dtype)

    def labels_to_fit(self, task: str) -> Tensor:
        label = super().labels_to_fit(task)
        return self._renumbered(task, label) if task in self._numbers else label

    def label_identity(self, task: str) -> str | None:
        return None if task in self._numbers else super().label_identity(task)
