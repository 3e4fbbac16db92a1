"""The metrics of `normals`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtl.tasks.means import Means
from mtl.tasks.metrics import Metrics
from mtl.tasks.normals_losses import angles, labelled_normals

# Angles are counted in bins this wide (degrees); 11.25, 22.5 and 30 lie on edges, so shares under them are exact.
_ANGLE_BIN = 3.75 / 2**15
_NUM_BINS = round(180 / _ANGLE_BIN)


class NormalsMetrics(Metrics):
    """Sum and histogram of the angle between predicted and true normals, over labelled pixels."""

    higher = ("within_11", "within_22", "within_30")
    lower = ("mean", "median")

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.histogram: Tensor | None = None

    def update(self, output: Tensor, label: Tensor) -> None:
        mask = labelled_normals(label)
        angle = angles(output, label)
        if self.total is None or self.histogram is None:
            self.total, self.histogram = (zeros.to(output.device) for zeros in self._zeros())
        self.total = self.total + (angle * mask).sum()
        # Unlabelled pixels go to a bin after the last.
        bins = torch.where(mask, (angle / _ANGLE_BIN).long(), _NUM_BINS + 1).flatten()
        self.histogram.scatter_add_(0, bins, torch.ones_like(bins))

    def state(self) -> list[Tensor]:
        if self.total is None or self.histogram is None:
            return list(self._zeros())
        return [self.total, self.histogram]

    def load_state(self, state: Sequence[Tensor]) -> None:
        self.total, self.histogram = state

    @staticmethod
    def _zeros() -> tuple[Tensor, Tensor]:
        return torch.zeros((), dtype=torch.float64), torch.zeros(_NUM_BINS + 2, dtype=torch.int64)

    def compute(self) -> dict[str, float]:
        """`mean` and `median` in degrees (the median to within 0.0002), `within_x`: share under x degrees."""
        names = {11.25: "within_11", 22.5: "within_22", 30.0: "within_30"}
        if self.total is None or self.histogram is None or not int(self.histogram[:-1].sum()):
            return dict.fromkeys(["mean", "median", *names.values()], float("nan"))
        cumulated = self.histogram[:-1].cumsum(0).cpu()
        count = int(cumulated[-1])
        middle = int(torch.searchsorted(cumulated, (count + 1) // 2))
        shares = {name: int(cumulated[round(x / _ANGLE_BIN) - 1]) / count for x, name in names.items()}
        return {"mean": self.total.item() / count, "median": (middle + 0.5) * _ANGLE_BIN, **shares}


class AngleRmse(Means):
    """The root of the mean squared angle."""

    num_terms = 1
    lower = ("rmse",)

    def terms(self, output: Tensor, label: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        return labelled_normals(label), [angles(output, label).square()]

    def finish(self, means: Sequence[float]) -> dict[str, float]:
        """`rmse`: degrees."""
        return {"rmse": means[0] ** 0.5}
