"""The losses of `classification` and `segmentation`: cross-entropy and the focal loss."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from mtl.config import Strict
from mtl.config.types import NotNegative, Positive
from mtl.tasks.loss import Loss

# One weight for each class; `balanced` weighs each by the inverse of its frequency.
ClassWeights = list[Positive] | Literal["balanced"]


class _OfMaps(torch.autograd.Function):
    """Cross-entropy of maps on a CPU: the same as torch's, whose backward fills and reads two more maps of all classes.

    A third to a half of the time. The largest logit is subtracted first, as `log_softmax` does.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, label: Tensor) -> Tensor:
        label = label[:, None]
        top = output.amax(dim=1, keepdim=True)
        parts = (output - top).exp_()
        total = parts.sum(dim=1, keepdim=True)
        ctx.save_for_backward(output, label, parts, total)
        return (total.log() + top - output.gather(1, label))[:, 0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        output, label, parts, total = ctx.saved_tensors
        gradient = gradient[:, None]
        # Only what is made of the output itself has a gradient of its own.
        own = output.softmax(dim=1) * gradient if torch.is_grad_enabled() else parts * (gradient / total)
        return own.scatter_add_(1, label, -gradient), None


def surprise_of(output: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy in nats, "b ...", of logits "b c ..." and classes "b ...", int64."""
    if output.ndim > 2 and output.device.type == "cpu" and output.dtype == torch.float32:
        surprise: Tensor = _OfMaps.apply(output, label)
        return surprise
    return functional.cross_entropy(output, label, reduction="none")


class ClassLoss(Loss):
    """A loss whose entries weigh by their class.

    Attributes:
        class_weights: The weights as they are written; None if the task decides.
    """

    class_weights: ClassWeights | None = None


class CrossEntropy(ClassLoss):
    """Cross-entropy of logits "b c ..." and classes "b ...", in nats.

    With label smoothing e, the target is 1 - e on the true class plus e / c on each of the c classes (Szegedy et al.,
    arXiv 1512.00567, section 7).
    """

    class Options(Strict):
        label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
        class_weights: ClassWeights | None = None

    def __init__(self, label_smoothing: float = 0.0, class_weights: ClassWeights | None = None) -> None:
        self.label_smoothing = label_smoothing
        self.class_weights = class_weights

    def __call__(self, output: Tensor, label: Tensor) -> Tensor:
        if not self.label_smoothing:
            return surprise_of(output, label)
        return functional.cross_entropy(output, label, reduction="none", label_smoothing=self.label_smoothing)


class Focal(ClassLoss):
    """The focal loss, -(1 - p)^gamma log p with p the probability of the true class (Lin et al., arXiv 1708.02002).

    Its alpha is `class_weights`; the mean is over the sum of weights, not over the number of foreground anchors.
    """

    class Options(Strict):
        gamma: NotNegative = 2.0
        class_weights: ClassWeights | None = None

    def __init__(self, gamma: float = 2.0, class_weights: ClassWeights | None = None) -> None:
        self.gamma = gamma
        self.class_weights = class_weights

    def __call__(self, output: Tensor, label: Tensor) -> Tensor:
        surprise = surprise_of(output, label)
        # 1 - p, from its logarithm's other side: exact where p is near 1, and never 0 times infinity in the gradient.
        return (-(-surprise).expm1()).clamp(min=1e-7) ** self.gamma * surprise
