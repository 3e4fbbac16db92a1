"""The losses of `classification` and `segmentation`: cross-entropy and the focal loss."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional

from mtl.config import Strict
from mtl.config.types import NotNegative, Positive
from mtl.tasks.loss import Loss

# One weight for each class; `balanced` weighs each by the inverse of its frequency.
ClassWeights = list[Positive] | Literal["balanced"]


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
        surprise = functional.cross_entropy(output, label, reduction="none")
        # 1 - p, from its logarithm's other side: exact where p is near 1, and never 0 times infinity in the gradient.
        return (-(-surprise).expm1()).clamp(min=1e-7) ** self.gamma * surprise
