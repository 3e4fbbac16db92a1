"""The losses of yes or no: `multilabel`, `edges`, `saliency`. They receive logits and labels of one shape."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional

from mtl.config import Strict
from mtl.config.types import NotNegative
from mtl.tasks.loss import Loss


def cross_entropy(output: Tensor, label: Tensor) -> Tensor:
    """Binary cross-entropy of logits, in nats, elementwise; labels are 0 and 1."""
    return functional.binary_cross_entropy_with_logits(output, label.to(output.dtype), reduction="none")


class Bce(Loss):
    """Binary cross-entropy."""

    def __call__(self, output: Tensor, label: Tensor) -> Tensor:
        return cross_entropy(output, label)


class BinaryFocal(Loss):
    """The focal loss, -(1 - p)^gamma log p with p the probability of the truth (Lin et al., arXiv 1708.02002)."""

    class Options(Strict):
        gamma: NotNegative = 2.0

    def __init__(self, gamma: float = 2.0) -> None:
        self.gamma = gamma

    def __call__(self, output: Tensor, label: Tensor) -> Tensor:
        surprise = cross_entropy(output, label)
        return (-(-surprise).expm1()).clamp(min=1e-7) ** self.gamma * surprise


class WeightedBce(Loss):
    """Cross-entropy times w on positives, 1 - w on negatives, with a fixed w; the mean is over all labelled pixels.

    The edge loss of the code bases of Vandenhende et al. and InvPT, with w = 0.95.
    """

    class Options(Strict):
        positive_weight: Annotated[float, Field(gt=0, lt=1)] = 0.95

    def __init__(self, positive_weight: float = 0.95) -> None:
        self.positive_weight = positive_weight

    def __call__(self, output: Tensor, label: Tensor) -> Tensor:
        w = self.positive_weight
        return cross_entropy(output, label) * (1 - w + (2 * w - 1) * label.to(output.dtype))

    def constant(self, values: Tensor) -> float:
        return log_odds(values) + math.log(self.positive_weight / (1 - self.positive_weight))


class BalancedBce(Loss):
    """Cross-entropy times w on positives, 1 - w on negatives, with w the image's share of negatives, averaged over it.

    HED: Xie and Tu, arXiv 1504.06375, equation 2, which is a sum. Others take the share of the batch: ours does not
    depend on how a batch is divided.
    """

    per: ClassVar[Literal["entry", "image"]] = "image"

    def __call__(self, output: Tensor, label: Tensor) -> Tensor:
        output, label = output.flatten(1), label.flatten(1)
        counts = label >= 0
        truth = (label == 1).to(output.dtype)
        num = counts.sum(dim=1, keepdim=True).clamp(min=1)
        w = 1 - truth.sum(dim=1, keepdim=True) / num
        losses = cross_entropy(output, truth) * (w * truth + (1 - w) * (1 - truth)) * counts
        return losses.sum(dim=1) / num[:, 0]

    def constant(self, values: Tensor) -> float:  # noqa: ARG002  one signature for all
        """0: positives and negatives of every image weigh the same."""
        return 0.0


def log_odds(values: Tensor) -> float:
    """The logit of the share of ones; as if there were half a one or half a zero where there is none at all.

    Args:
        values: "n", 0 and 1.
    """
    num = len(values)
    positive = min(max(float(values.double().sum()), 0.5), num - 0.5)
    return math.log(positive / (num - positive)) if num else 0.0
