"""The losses of predicted numbers, such as `regression` and `depth`: of their difference to the label."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from mtl.config import Strict
from mtl.config.types import NotNegative, Positive
from mtl.tasks.loss import Loss


class L1(Loss):
    """|p - y|."""

    def __call__(self, output: Tensor, label: Tensor) -> Tensor:
        return (output - label).abs()

    def constant(self, values: Tensor) -> float:
        return float(values.median())


class Mse(Loss):
    """(p - y)^2."""

    def __call__(self, output: Tensor, label: Tensor) -> Tensor:
        return (output - label).square()

    def constant(self, values: Tensor) -> float:
        return float(values.double().mean())


class Huber(Loss):
    """e^2 / 2 for |e| = |p - y| up to delta, from there on delta (|e| - delta / 2) (Huber 1964)."""

    class Options(Strict):
        delta: Positive = 1.0

    def __init__(self, delta: float = 1.0) -> None:
        self.delta = delta

    def __call__(self, output: Tensor, label: Tensor) -> Tensor:
        error = (output - label).abs()
        near = error.clamp(max=self.delta)
        return near * (error - near / 2)

    def constant(self, values: Tensor) -> float:
        return root_of(lambda at: (at - values).clamp(-self.delta, self.delta).double().mean(), values)


class ImageNumberLoss(Loss):
    """A loss of each image's numbers as a whole; NaN is no label."""

    per: ClassVar[Literal["entry", "image"]] = "image"

    @staticmethod
    def errors(output: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each image, p - y, "b n", 0 where there is no label; which count, "b n"; how many, "b 1", at least 1."""
        counts = label.isfinite().flatten(1)
        error = (output.flatten(1) - label.flatten(1).nan_to_num()) * counts
        return error, counts, counts.sum(dim=1, keepdim=True).clamp(min=1)


class BerHu(ImageNumberLoss):
    """|e| up to c, above it (e^2 + c^2) / 2c, with c = `share` max |e| (Laina et al., arXiv 1606.00373, equation 2).

    Our maximum is that of the image, where theirs is the batch's: the loss must not depend on how a batch is divided.
    """

    class Options(Strict):
        share: Annotated[float, Field(gt=0, le=1)] = 0.2

    def __init__(self, share: float = 0.2) -> None:
        self.share = share

    def __call__(self, output: Tensor, label: Tensor) -> Tensor:
        error, counts, num = self.errors(output, label)
        error = error.abs()
        limit = (self.share * error.detach().amax(dim=1, keepdim=True)).clamp(min=1e-6)
        loss = error.where(error <= limit, (error.square() + limit.square()) / (2 * limit))
        return (loss * counts).sum(dim=1) / num[:, 0]


class SiLog(ImageNumberLoss):
    """sqrt(Var d + w (mean d)^2) of the errors d of an image's logarithms (Eigen et al., arXiv 1406.2283, equation 4).

    w = 0 does not see a factor common to all of the image's depths. Their form has w = 0.5 and no root.
    """

    class Options(Strict):
        mean_weight: NotNegative = 0.15

    def __init__(self, mean_weight: float = 0.15) -> None:
        self.mean_weight = mean_weight

    def __call__(self, output: Tensor, label: Tensor) -> Tensor:
        error, counts, num = self.errors(output, label)
        mean = error.sum(dim=1, keepdim=True) / num
        variance = ((error - mean).square() * counts).sum(dim=1) / num[:, 0]
        # The small number keeps the gradient finite at a perfect prediction.
        return (variance + self.mean_weight * mean[:, 0].square() + 1e-12).sqrt()

    def constant(self, values: Tensor) -> float:
        """The mean: best for one image."""
        return float(values.double().mean())


class SiLogOfMetres(SiLog):
    """`SiLog` where predictions and labels are metres; a prediction below a millimetre counts as one."""

    def __call__(self, output: Tensor, label: Tensor) -> Tensor:
        return super().__call__(output.clamp(min=1e-3).log(), label.log())

    def constant(self, values: Tensor) -> float:
        return float(values.double().log().mean().exp())


def root_of(slope: Callable[[float], Tensor], values: Tensor) -> float:
    """Where a rising function is 0 between the smallest and the largest of some values, by bisection."""
    low, high = float(values.min()), float(values.max())
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if float(slope(middle)) > 0 else (middle, high)
    return (low + high) / 2
