"""Metrics of yes or no for each pixel, by thresholds on the probability of yes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtl.tasks.metrics import Metrics


def probability(output: Tensor, label: Tensor) -> Tensor:
    """The probability of yes, "b h w", float64; the worst one, 1 - label, where the output is NaN.

    Args:
        output: "b 1 h w", logits.
        label: "b h w", 1 and 0, or another number for none.
    """
    logits = output[:, 0].double()
    return torch.where(logits.isnan(), (label != 1).double(), logits.sigmoid())


class MaxF(Metrics):
    """The best F over thresholds, of pixels of the whole set: 2 columns (no, yes) of counts by thresholds reached."""

    higher = ("max_f",)

    def __init__(self, thresholds: Sequence[float], beta_squared: float, name: str = "max_f") -> None:
        self.thresholds = torch.tensor(thresholds, dtype=torch.float64)
        self.beta_squared = beta_squared
        self.name = name
        self.higher = (name,)
        self.counts: Tensor | None = None

    def score(self, output: Tensor, label: Tensor) -> Tensor:
        """The score that is compared with the thresholds, "b h w", float64."""
        return probability(output, label)

    def update(self, output: Tensor, label: Tensor) -> None:
        if self.thresholds.device != output.device:
            self.thresholds = self.thresholds.to(output.device)
        num_reached = torch.bucketize(self.score(output, label), self.thresholds, right=True)
        is_labelled, num_cells = (label == 0) | (label == 1), 2 * (len(self.thresholds) + 1)
        # Unlabelled pixels go to a cell after the last.
        cell = torch.where(is_labelled, 2 * num_reached + (label == 1), num_cells).flatten()
        if self.counts is None:
            self.counts = torch.zeros(num_cells + 1, dtype=torch.int64, device=output.device)
        self.counts.scatter_add_(0, cell, torch.ones_like(cell))

    def state(self) -> list[Tensor]:
        num_cells = 2 * (len(self.thresholds) + 1)
        return [torch.zeros(num_cells + 1, dtype=torch.int64) if self.counts is None else self.counts]

    def load_state(self, state: Sequence[Tensor]) -> None:
        (self.counts,) = state

    def compute(self) -> dict[str, float]:
        """The maximum over thresholds of (1 + b) P R / (b P + R), b = beta squared; 0 where P and R are 0."""
        counts = self.state()[0][:-1].cpu().double().view(-1, 2)
        if not counts.sum():
            return {self.name: torch.nan}
        # At threshold i, yes is predicted where more than i thresholds are reached.
        predicted = counts.flip(0).cumsum(0).flip(0)[1:]
        hits, num_true = predicted[:, 1], counts[:, 1].sum()
        # (1 + b) P R / (b P + R), with numerator and denominator times (predicted yes) / hits.
        f = (1 + self.beta_squared) * hits / (self.beta_squared * num_true + predicted.sum(1))
        return {self.name: f.nan_to_num().max().item()}


class ForegroundIou(Metrics):
    """Intersection over union of yes at a threshold of 0.5, and the mean error of the probability, over the set."""

    higher = ("iou",)
    lower = ("mae",)

    def __init__(self) -> None:
        self.sums: Tensor | None = None

    def update(self, output: Tensor, label: Tensor) -> None:
        score, truth = probability(output, label), label == 1
        is_labelled, answer = truth | (label == 0), score >= 0.5
        rows = [torch.ones_like(score), truth & answer, truth | answer, (score - truth.double()).abs()]
        sums = torch.stack([(row * is_labelled).sum(dtype=torch.float64) for row in rows])
        self.sums = sums if self.sums is None else self.sums + sums

    def state(self) -> list[Tensor]:
        return [torch.zeros(4, dtype=torch.float64) if self.sums is None else self.sums]

    def load_state(self, state: Sequence[Tensor]) -> None:
        (self.sums,) = state

    def compute(self) -> dict[str, float]:
        """`iou`: 1 if neither labels nor predictions say yes; `mae`: mean absolute error of the probability."""
        count, both, either, error = self.state()[0].tolist()
        if not count:
            return {"iou": torch.nan, "mae": torch.nan}
        return {"iou": both / either if either else 1.0, "mae": error / count}
