"""A data set in memory: stored images and labels, and batches of them without a Python loop per sample."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mtl.data.augment import View


@dataclass(frozen=True)
class Batch:
    """Some images and their labels.

    Attributes:
        split: Where they come from.
        indices: "b", int64, on the CPU: the images' places there.
        labels: By task; class labels int64, others float32.
        device: Where labels are, and images will be.
        view: How the images are seen; as they are if not given.
    """

    split: Split
    indices: Tensor
    labels: dict[str, Tensor]
    device: torch.device
    view: View | None = None

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.split.images.shape[1], self.split.images.shape[2]

    @cached_property
    def images(self) -> Tensor:
        """Of shape "b h w c", uint8; read when first asked for, since kept features make them needless."""
        images = _moved(self.split.images[self.indices], self.device)
        return images if self.view is None else self.view.of(images, self.indices)

    def to(self, device: torch.device) -> Batch:
        labels = {name: _moved(label, device) for name, label in self.labels.items()}
        return Batch(self.split, self.indices, labels, device, self.view)


@dataclass(frozen=True)
class Split:
    """The training or the validation half of a data set.

    Attributes:
        images: "n h w c", uint8.
        labels: By name, first axis n; whole numbers of any width for classes, floats of any width otherwise.
    """

    images: Tensor
    labels: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.images)

    def only(self, names: Collection[str]) -> Split:
        """The same images with these labels."""
        return Split(self.images, {name: self.labels[name] for name in names})

    def batch(self, indices: Tensor, view: View | None = None) -> Batch:
        """The images at these places, in a view of them, with labels in the types that losses take."""
        labels = {name: label[indices] for name, label in self.labels.items()}
        return Batch(
            self,
            indices,
            {name: label.float() if label.is_floating_point() else label.long() for name, label in labels.items()},
            torch.device("cpu"),
            view,
        )


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on its way to a device, without waiting for it."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def training_batches(split: Split, batch_size: int, seed: int, epoch: int, view: View | None = None) -> Iterator[Batch]:
    """One pass in random order.

    The order depends on seed and epoch alone, so that a run can be taken up anywhere. A last batch that is not full is
    left out, another one each time: BatchNorm cannot train on one image.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(split), generator=generator)
    for number in range(num_batches(len(split), batch_size)):
        yield split.batch(order[number * batch_size : (number + 1) * batch_size], view)


def num_batches(num_images: int, batch_size: int) -> int:
    """Batches in one training pass: full ones only, but at least one."""
    return max(1, num_images // batch_size)


def validation_batches(split: Split, batch_size: int) -> Iterator[Batch]:
    """Every image once, in order."""
    for start in range(0, len(split), batch_size):
        yield split.batch(torch.arange(start, min(start + batch_size, len(split))))
