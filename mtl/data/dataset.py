"""One half of a data set: batches of it, without regard to where images and labels lie."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from mtl.data.augment import View
from mtl.data.cache import DataError
from mtl.data.orders import Order, Shuffled
from mtl.data.transfer import to_device
from mtl.runtime.tensors import aligned
from mtl.tasks import Task


@dataclass(frozen=True)
class Rows:
    """The stored labels and images of some samples, on the host, in the types in which they are stored.

    Attributes:
        labels: By task.
        images: "b h w c", uint8, or float32 from 0 to 255; None if they were not to be read.
        lacking: The tasks of which none of the images has a label.
        fault: Why they cannot be read; then there is nothing else.
    """

    labels: dict[str, Tensor]
    images: Tensor | None
    lacking: frozenset[str] = frozenset()
    fault: str = ""


@dataclass(frozen=True)
class Batch:
    """Some images and their labels.

    Attributes:
        split: Where they come from.
        indices: "b", int64, on the CPU: those of the images in the split.
        labels: By task; class labels int64, others float32.
        device: Where labels are, and images will be.
        view: How the images are seen; as they are if not given.
        stored: "b h w c", the images as the split gives them, if they were read together with the labels.
        every: Where several ranks share kept features: the indices of each rank's batch in this step, by rank, this
            one's included.
        lacking: The tasks of which none of the images has a label.
    """

    split: Split
    indices: Tensor
    labels: dict[str, Tensor]
    device: torch.device
    view: View | None = None
    every: tuple[Tensor, ...] | None = None
    stored: Tensor | None = None
    lacking: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def everyone(self) -> Tensor:
        """The indices of the images of all ranks, "b", on the CPU."""
        return self.indices if self.every is None or len(self.every) == 1 else torch.cat(self.every)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.split.size

    @cached_property
    def images(self) -> Tensor:
        """Of shape "b h w c", uint8, or float32 from 0 to 255; read when first asked for, since a step with kept
        features needs no images.
        """
        stored = self.split.images_of(self.indices, self.view) if self.stored is None else self.stored
        images = to_device(stored, self.device)
        return images if self.view is None or self.view.light is None else self.view.light.of(images, self.indices)

    def to(self, device: torch.device) -> Batch:
        if device == self.device:
            return self
        labels = {name: to_device(label, device) for name, label in self.labels.items()}
        stored = None if self.stored is None else to_device(self.stored, device)
        return replace(self, labels=labels, device=device, stored=stored)

    def parts(self, shares: Sequence[Sequence[Tensor]], rank: int) -> list[Batch]:
        """The batches whose images, one after the other, are those of this one; labels are views of its own.

        Args:
            shares: By batch and rank, the indices of the images, which have a label of each task.
            rank: The rank whose batches they are.
        """
        sizes = [len(each[rank]) for each in shares]
        labels = {name: list(map(aligned, torch.split(label, sizes))) for name, label in self.labels.items()}
        return [
            Batch(
                self.split,
                every[rank],
                {name: parts[number] for name, parts in labels.items()},
                self.device,
                self.view,
                tuple(every),
            )
            for number, every in enumerate(shares)
        ]


class Split(ABC):
    """The training or the validation half of a data set.

    Attributes:
        is_in_memory: Whether reading takes no time.
        num_skipped: Samples that were left out, since one of their labels cannot be trained on.
    """

    num_skipped: int = 0
    is_in_memory: bool

    def order(self, tasks: Collection[str]) -> Order:  # noqa: ARG002  several data sets need them
        """The order of the training images where these tasks are trained."""
        return Shuffled(len(self))

    def examples(self, num: int) -> Tensor:
        """The indices of some images for pictures, "num", or fewer if there are fewer."""
        return torch.arange(min(num, len(self)))

    @property
    @abstractmethod
    def size(self) -> tuple[int, int]:
        """Height and width of its images in pixels."""

    @property
    @abstractmethod
    def channels(self) -> int:
        """Channels of its images."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of images."""

    @abstractmethod
    def rows(self, indices: Tensor, with_images: bool, view: View | None = None) -> Rows:
        """Reads the stored rows of some images; also called in processes of data workers.

        Args:
            indices: "b", int64.
            with_images: Whether to read the images too.
            view: How they are seen; images and labels are transformed alike.
        """

    def begin_phase(self, tasks: Collection[str]) -> None:  # noqa: B027  most have nothing to do
        """From here on, batches need the labels of these tasks alone; until then, those of all.

        Args:
            tasks: Those whose losses are active.
        """

    def images_of(self, indices: Tensor, view: View | None) -> Tensor:
        """The images alone, "b h w c".

        Raises:
            DataError: One cannot be read.
        """
        rows = self.rows(indices, with_images=True, view=view)
        if rows.images is None:
            raise DataError(rows.fault)
        return rows.images

    def label_bytes(self) -> int | None:
        """Bytes of an image's labels in the types that losses take; None if reading them takes time, or some lack."""
        return None

    @property
    def may_lack(self) -> bool:
        """Whether a batch can be without a label of some task."""
        return True

    @abstractmethod
    def labels_to_fit(self, task: str) -> Tensor:
        """Labels from which the task's constant is fitted, first axis n: all, or those of images at even distances."""

    @abstractmethod
    def identity(self) -> str | None:
        """A digest of the images, another one whenever an image is; None if the data set cannot tell."""

    @abstractmethod
    def label_identity(self, task: str) -> str | None:
        """The same of the labels that a task learns."""

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

        Raises:
            DataError: Something cannot be read.
        """
        rows = rows or self.rows(indices, with_images=False, view=view)
        if rows.fault:
            raise DataError(rows.fault)
        labels = {name: as_taken(label) for name, label in rows.labels.items()}
        own = None if every is None else tuple(every)
        return Batch(self, indices, labels, torch.device("cpu"), view, own, rows.images, rows.lacking)


def lacking(labels: Mapping[str, Tensor], tasks: Mapping[str, Task]) -> frozenset[str]:
    """The tasks of which none of some samples has a label: each is looked at by itself, up to the first with one.

    Args:
        labels: By task, first axis b.
        tasks: The tasks by name.
    """
    return frozenset(
        name for name, own in labels.items() if not any(bool(tasks[name].has_label(as_taken(one[None]))) for one in own)
    )


def as_taken(label: Tensor) -> Tensor:
    """Labels in the type that losses take: int64 of classes, else float32."""
    return label.float() if label.is_floating_point() else label.long()
