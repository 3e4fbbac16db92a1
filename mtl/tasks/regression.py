"""`regression`: numbers of an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mtl.tasks.base import Goal, LabelKind
from mtl.tasks.entries import EntryTask
from mtl.tasks.loss import Loss, as_float
from mtl.tasks.metrics import Metrics
from mtl.tasks.number_losses import L1, Huber, Mse


class RegressionMetrics(Metrics):
    """For each number, over labelled images: count, sums of |e|, e^2, y and y^2, "5 k", float64."""

    higher = ("r2",)
    lower = ("mae", "rmse")

    def __init__(self, num_outputs: int, scale: float) -> None:
        self._num_outputs = num_outputs
        self._scale = scale
        self.sums: Tensor | None = None

    def update(self, output: Tensor, label: Tensor) -> None:
        label = label.view(output.shape).double()
        mask = label.isfinite()
        truth = label.where(mask, 0)
        error = ((self._scale * output.double()) - truth).abs().nan_to_num(torch.inf)
        rows = [torch.ones_like(truth), error, error.square(), truth, truth.square()]
        sums = torch.stack([row.where(mask, 0).sum(dim=0) for row in rows])
        self.sums = sums if self.sums is None else self.sums + sums

    def state(self) -> list[Tensor]:
        return [torch.zeros(5, self._num_outputs, dtype=torch.float64) if self.sums is None else self.sums]

    def load_state(self, state: Sequence[Tensor]) -> None:
        (self.sums,) = state

    def compute(self) -> dict[str, float]:
        """`mae`, `rmse`: mean absolute error, root mean squared error; `r2`: 1 - sum of e^2 / sum of (y - mean y)^2.

        Each is a mean over the numbers that have labels; `r2` over those whose labels are not all the same.
        """
        sums = self.state()[0].cpu()
        count, absolute, squared, total, squares = sums[:, sums[0] > 0]
        spread = squares - total.square() / count
        # What is left of the difference of two large sums is rounding.
        varies = spread > 1e-12 * squares
        return {
            "mae": (absolute / count).mean().item(),
            "rmse": (squared / count).sqrt().mean().item(),
            "r2": (1 - squared / spread)[varies].mean().item(),
        }


class Regression(EntryTask):
    """Numbers of an image. The head outputs them in units of `scale`.

    Losses receive prediction and label "b k" in units of `scale`.
    """

    output: ClassVar[Literal["dense", "vector"]] = "vector"
    label_kind: LabelKind = "numbers"
    goal = Goal("mae", perfect=0.0)
    losses: ClassVar[Mapping[str, type[Loss]]] = {"l1": L1, "mse": Mse, "huber": Huber}

    def __init__(self, num_outputs: int = 1, scale: float = 1.0, loss: Loss | None = None) -> None:
        self.num_outputs = num_outputs
        self.scale = scale
        self.entry_loss = loss or L1()

    def fit(self, label: Tensor) -> Tensor:
        """Of each number what the loss says is best, else its mean; 0 without a label."""
        columns = (as_float(label) / self.scale).view(len(label), self.num_outputs).unbind(dim=1)
        return torch.tensor([self._best(column[column.isfinite()]) for column in columns])

    def _best(self, values: Tensor) -> float:
        if not len(values):
            return 0.0
        best = self.entry_loss.constant(values)
        return float(values.double().mean()) if best is None else best

    def _numbers(self, label: Tensor) -> Tensor:
        return label.view(len(label), self.num_outputs)

    def entry_weights(self, label: Tensor) -> Tensor:
        return self._numbers(label).isfinite()

    def stand_in(self, label: Tensor) -> Tensor:
        return self.marked(label).nan_to_num()

    def marked(self, label: Tensor) -> Tensor:
        return as_float(self._numbers(label)) / self.scale

    def blank(self, num_images: int, size: tuple[int, int]) -> Tensor:  # noqa: ARG002  one signature for all
        return torch.full((num_images, self.num_outputs), torch.nan)

    def metrics(self) -> RegressionMetrics:
        return RegressionMetrics(self.num_outputs, self.scale)

    def predict(self, output: Tensor, size: tuple[int, int]) -> Tensor:  # noqa: ARG002  one signature for all
        """The numbers in the label's unit, "b k", float64, as metrics compare them."""
        return self.scale * output.double()

    def as_label(self, prediction: Tensor) -> Tensor:
        return prediction.float()

    def as_data(self, prediction: Tensor) -> float | list[float]:
        """The number, or several as a list."""
        return prediction.item() if self.num_outputs == 1 else prediction.tolist()

    def caption(self, values: Tensor, is_label: bool) -> list[str]:
        """The first numbers, in the label's unit."""
        return super().caption(values if is_label else self.scale * values, is_label)

    def unlabelled(self, label: Tensor) -> Tensor:
        return torch.full_like(label, torch.nan)

    def bad_samples(self, label: Tensor) -> Tensor:
        """Samples with an infinite number."""
        return label.isinf().flatten(1).any(dim=1) if label.ndim > 1 else label.isinf()

    def check_labels(self, label: Tensor) -> None:
        shapes = [(len(label), self.num_outputs), *([(len(label),)] if self.num_outputs == 1 else [])]
        if tuple(label.shape) not in shapes or not label.dtype.is_floating_point:
            expected = f'expected floats of shape "n {self.num_outputs}"{" or n" if self.num_outputs == 1 else ""}'
            raise ValueError(f"{expected}, NaN for none, got {label.dtype} of shape {tuple(label.shape)}")
