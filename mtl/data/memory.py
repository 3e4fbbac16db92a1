"""A split in memory: batches of it without a Python loop per sample."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from mtl.data.augment import View
from mtl.data.dataset import Rows, Split, as_taken
from mtl.data.transforms import Pipeline
from mtl.runtime.fingerprint import fingerprint, fingerprint_of_json
from mtl.tasks import Task
from mtl.tasks.base import SPATIAL, LabelKind


@dataclass(frozen=True)
class Transform:
    """How the samples of a split in memory are changed.

    Attributes:
        pipeline: The changes.
        kinds: The kind of label that each task learns.
    """

    pipeline: Pipeline
    kinds: Mapping[str, LabelKind]

    @property
    def changes_labels(self) -> bool:
        """Whether a label lies in the image's plane, and changes with it."""
        return not SPATIAL.isdisjoint(self.kinds.values())

    def is_due(self, with_images: bool, view: View | None) -> bool:
        """Whether samples are changed: random changes need a view, and labels alone do not always change."""
        return (with_images or self.changes_labels) and not (view is None and self.pipeline.is_random)

    def __call__(
        self, images: Tensor, labels: Mapping[str, Tensor], indices: Tensor, view: View | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Each sample changed by itself, from the seed of its index.

        Args:
            images: "b h w c".
            labels: By task, first axis b.
            indices: "b", int64, those of the images in the split.
            view: How the images are seen.
        """
        changed = [
            self.pipeline(
                images[place].permute(2, 0, 1),
                {name: label[place] for name, label in labels.items()},
                self.kinds,
                None if view is None else view.seed_of(index),
            )
            for place, index in enumerate(indices.tolist())
        ]
        stacked = {name: torch.stack([own[name] for _, own in changed]) for name in labels}
        return torch.stack([image.permute(1, 2, 0) for image, _ in changed]), stacked


@dataclass(frozen=True)
class MemorySplit(Split):
    """Images and labels in memory.

    Attributes:
        images: "n h w c", uint8, or float32 from 0 to 255.
        labels: By task, first axis n; whole numbers of any width for classes, floats of any width otherwise.
        num_skipped: Samples that were left out, since one of their labels cannot be trained on.
        has_label: By task, "n", bool: which samples have a label; a task that is not among them has one in each.
        transform: Changes of each sample; random ones where it is seen in a view.
    """

    is_in_memory: ClassVar[bool] = True  # type: ignore[misc]

    images: Tensor
    labels: dict[str, Tensor]
    num_skipped: int = 0
    has_label: Mapping[str, Tensor] = field(default_factory=dict, compare=False)
    transform: Transform | None = field(default=None, compare=False)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def size(self) -> tuple[int, int]:
        return self.images.shape[1], self.images.shape[2]

    @property
    def channels(self) -> int:
        return self.images.shape[3]

    def with_labels(self, label_of: Mapping[str, str]) -> MemorySplit:
        """The same images with the labels of some tasks, which may share one.

        Args:
            label_of: The name of each task's label.
        """
        return replace(self, labels={name: self.labels[label] for name, label in label_of.items()})

    def without(self, bad: Tensor) -> MemorySplit:
        """The other images, in their order.

        Args:
            bad: "n", bool.
        """
        labels = {name: label[~bad] for name, label in self.labels.items()}
        has_label = {name: has[~bad] for name, has in self.has_label.items()}
        num_skipped = self.num_skipped + int(bad.sum())
        return replace(self, images=self.images[~bad], labels=labels, num_skipped=num_skipped, has_label=has_label)

    def knowing(self, tasks: Mapping[str, Task]) -> MemorySplit:
        """The same, knowing which samples have a label of each task."""
        has_label = dict[str, Tensor]()
        for name, task in tasks.items():
            # In parts, since comparisons take as much room as the labels.
            has = torch.cat([task.has_label(as_taken(part)) for part in torch.split(self.labels[name], 256)])
            if not bool(has.all()):
                has_label[name] = has
        return replace(self, has_label=has_label)

    def label_parts(self, task: str) -> Iterable[Tensor]:
        """The labels of a task in their order, some images at a time: comparisons take as much room as labels."""
        return torch.split(self.labels[task], 1024)

    def image_parts(self) -> Iterable[Tensor]:
        """The images in their order, some at a time."""
        return torch.split(self.images, 1024)

    def rows(self, indices: Tensor, with_images: bool, view: View | None = None) -> Rows:
        labels = {name: label[indices] for name, label in self.labels.items()}
        lacking = frozenset(name for name, has in self.has_label.items() if not bool(has[indices].any()))
        if self.transform is None or not self.transform.is_due(with_images, view):
            return Rows(labels, self.images[indices] if with_images else None, lacking)
        images, labels = self.transform(self.images[indices], labels, indices, view)
        return Rows(labels, images if with_images else None, lacking)

    def label_bytes(self) -> int | None:
        if self.may_lack or (self.transform is not None and self.transform.changes_labels):
            return None
        # As losses take them: int64 or float32.
        return sum(label[0].numel() * (4 if label.is_floating_point() else 8) for label in self.labels.values())

    @property
    def may_lack(self) -> bool:
        return bool(self.has_label)

    def labels_to_fit(self, task: str) -> Tensor:
        return self.labels[task]

    def identity(self) -> str:
        own = self._digest
        return own if self.transform is None else fingerprint_of_json([own, self.transform.pipeline.describe()])

    @cached_property
    def _digest(self) -> str:
        return fingerprint(self.images)

    def label_identity(self, task: str) -> str:
        return fingerprint(self.labels[task])
