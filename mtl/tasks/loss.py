"""The interface of a loss: what one entry of a label costs. The task takes the weighted mean over labelled entries."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from pydantic import BaseModel
from torch import Tensor


class Loss(ABC):
    """The loss of each entry (image, pixel, attribute), or of each image, of a batch.

    A class of the user's own receives its options as keyword arguments; see docs/own_loss.md.

    Attributes:
        Options: The model of its options, a subclass of `mtl.config.Strict`; without one, they are not checked before
            they are passed.
        per: Whether a call gives the loss of each entry of the label, or one number for each image.
    """

    Options: ClassVar[type[BaseModel] | None] = None
    per: ClassVar[Literal["entry", "image"]] = "entry"

    @abstractmethod
    def __call__(self, output: Tensor, label: Tensor) -> Tensor:
        """Args:
            output: The prediction, in the form that the task type documents, float32.
            label: `per` entry: unlabelled entries hold a valid value in place of none (class 0, depth of 1 metre), and
                what is returned for them does not count. `per` image: they are NaN, or -1 among whole numbers, and the
                loss leaves them out itself.

        Returns:
            The loss of each entry, in the shape of the label's entries; `per` image, "b", and finite (with finite
            gradients) also for an image without any label, which does not count.
        """

    def weights(self, label: Tensor, weights: Tensor) -> Tensor:  # noqa: ARG002  losses with terms of their own need it
        """The weight of each number that a call returns, in the mean.

        Args:
            label: As the data set gives it.
            weights: The weight of each entry; 0 where there is no label.
        """
        return weights if self.per == "entry" else (weights > 0).flatten(1).any(dim=1)

    def constant(self, values: Tensor) -> float | None:  # noqa: ARG002  as above
        """The best constant prediction.

        Args:
            values: "n", labels of all labelled entries of one output, at least one.

        Returns:
            That number; None if the task's own rule holds (its mean, or the share of each class).
        """
        return None


def as_float(values: Tensor) -> Tensor:
    """Half precision and whole numbers as float32; float64 stays."""
    return values if values.dtype == torch.float64 else values.float()


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Mean of `values` by `weights`, bool or floats; 0 if all of these are 0; no host sync."""
    return (values * weights).sum() / weights.sum().clamp(min=1e-6)
