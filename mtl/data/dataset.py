"""A data set in memory: stored images and labels, and batches of them without a Python loop per sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from mtl.data.augment import View
from mtl.data.transfer import to_device


@dataclass(frozen=True)
class Batch:
    """Some images and their labels.

    Attributes:
        split: Where they come from.
        indices: "b", int64, on the CPU: those of the images in the split.
        labels: By task; class labels int64, others float32.
        device: Where labels are, and images will be.
        view: How the images are seen; as they are if not given.
        stored: "b h w c", uint8, the images as the split has them, if they were read together with the labels.
        every: Where several ranks share kept features: the indices of each rank's batch in this step, by rank, this
            one's included.
    """

    split: Split
    indices: Tensor
    labels: dict[str, Tensor]
    device: torch.device
    view: View | None = None
    every: tuple[Tensor, ...] | None = None
    stored: Tensor | None = None

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def everyone(self) -> Tensor:
        """The indices of the images of all ranks, "b", on the CPU."""
        return self.indices if self.every is None else torch.cat(self.every)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.split.images.shape[1], self.split.images.shape[2]

    @cached_property
    def images(self) -> Tensor:
        """Of shape "b h w c", uint8; read when first asked for, since a step with kept features needs no images."""
        stored = self.split.images[self.indices] if self.stored is None else self.stored
        images = to_device(stored, self.device)
        return images if self.view is None else self.view.of(images, self.indices)

    def to(self, device: torch.device) -> Batch:
        if device == self.device:
            return self
        labels = {name: to_device(label, device) for name, label in self.labels.items()}
        stored = None if self.stored is None else to_device(self.stored, device)
        return replace(self, labels=labels, device=device, stored=stored)


@dataclass(frozen=True)
class Rows:
    """What is stored of some images, on the host, in the types in which it is stored.

    Attributes:
        labels: By name.
        images: None if they were not to be read.
    """

    labels: dict[str, Tensor]
    images: Tensor | None


@dataclass(frozen=True)
class Split:
    """The training or the validation half of a data set.

    Attributes:
        images: "n h w c", uint8.
        labels: By name, first axis n; whole numbers of any width for classes, floats of any width otherwise.
        num_skipped: Samples that were left out, since one of their labels cannot be trained on.
    """

    images: Tensor
    labels: dict[str, Tensor]
    num_skipped: int = 0

    def __len__(self) -> int:
        return len(self.images)

    def with_labels(self, label_of: Mapping[str, str]) -> Split:
        """The same images with the labels of some tasks, which may share one.

        Args:
            label_of: The name of each task's label.
        """
        return replace(self, labels={name: self.labels[label] for name, label in label_of.items()})

    def without(self, bad: Tensor) -> Split:
        """The other images, in their order.

        Args:
            bad: "n", bool.
        """
        labels = {name: label[~bad] for name, label in self.labels.items()}
        return Split(self.images[~bad], labels, self.num_skipped + int(bad.sum()))

    def rows(self, indices: Tensor, with_images: bool) -> Rows:
        """Copies of what is stored of some images.

        Args:
            indices: "b", int64.
            with_images: Whether to read the images too.
        """
        labels = {name: label[indices] for name, label in self.labels.items()}
        return Rows(labels, self.images[indices] if with_images else None)

    def batch(
        self,
        indices: Tensor,
        view: View | None = None,
        every: Sequence[Tensor] | None = None,
        rows: Rows | None = None,
    ) -> Batch:
        """Some images, in a view of them, with labels in the types that losses take.

        Args:
            indices: "b", int64.
            view: How the images are seen.
            every: By rank, the indices of each rank's batch in this step.
            rows: What is stored of the images, if it was read already.
        """
        rows = rows or self.rows(indices, with_images=False)
        labels = {n: label.float() if label.is_floating_point() else label.long() for n, label in rows.labels.items()}
        own = None if every is None else tuple(every)
        return Batch(self, indices, labels, torch.device("cpu"), view, own, rows.images)
