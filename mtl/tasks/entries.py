"""`EntryTask`: a task whose loss is a weighted mean over the labelled entries of a batch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from mtl.tasks.base import Task
from mtl.tasks.loss import Loss, as_float, weighted_mean


class EntryTask(Task):
    """Base of all task types of this project: the loss of an entry is a `Loss`, which a configuration may choose.

    An entry is whatever has a label of its own: an image, a pixel, an attribute of an image.

    Attributes:
        losses: The losses that a configuration may name; the first is the default.
        entry_loss: The one in use.
    """

    losses: ClassVar[Mapping[str, type[Loss]]]
    entry_loss: Loss

    @abstractmethod
    def entry_weights(self, label: Tensor) -> Tensor:
        """The weight of each entry, bool or float32, in the shape of the loss of entries; 0 where there is no label."""

    @abstractmethod
    def stand_in(self, label: Tensor) -> Tensor:
        """The label as losses take it, with a valid value where there is none."""

    @abstractmethod
    def marked(self, label: Tensor) -> Tensor:
        """The label as losses take it, with NaN, or -1 among whole numbers, where there is none."""

    @abstractmethod
    def blank(self, num_images: int, size: tuple[int, int]) -> Tensor:
        """A label without any entry, for this number of images of this height and width."""

    def prediction(self, output: Tensor) -> Tensor:
        """The head's output as losses take it."""
        return as_float(output)

    def loss(self, output: Tensor, label: Tensor) -> Tensor:
        """The mean of the loss over labelled entries, or over images that have one.

        Args:
            output: As the head returns it.
            label: As the data set gives it.
        """
        given = self.stand_in(label) if self.entry_loss.per == "entry" else self.marked(label)
        return weighted_mean(self.entry_loss(self.prediction(output), given), self._weights(label))

    def weight(self, label: Tensor) -> Tensor:
        """The sum of the weights of what the loss is a mean of."""
        return self._weights(label).sum(dtype=torch.float64)

    def has_label(self, label: Tensor) -> Tensor:
        counts = self._weights(label) > 0
        return counts.flatten(1).any(dim=1) if counts.ndim > 1 else counts

    def _weights(self, label: Tensor) -> Tensor:
        return self.entry_loss.weights(label, self.entry_weights(label))
