"""What the code base of Vandenhende et al. (arXiv 2004.13379) prints, after ASTMT (Maninis et al., arXiv 1904.08918).

Its maps are stored in 8 bits a pixel before they are measured; ours are not. The F of edges that it prints is that of
MATLAB code (seism), which is not repeated here: `ods_f` of the task type is near it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mtl.tasks.base import Task
from mtl.tasks.binary_losses import WeightedBce
from mtl.tasks.binary_maps import Edges, Saliency
from mtl.tasks.confusion import Confusion
from mtl.tasks.depth import Depth
from mtl.tasks.depth_metrics import DepthMeans
from mtl.tasks.means import Means
from mtl.tasks.metrics import Metrics
from mtl.tasks.normals import Normals
from mtl.tasks.normals_losses import angles, labelled_normals
from mtl.tasks.protocols.averages import Averages
from mtl.tasks.segmentation import Segmentation
from mtl.tasks.thresholds import probability

_THRESHOLDS = [0.2 + 0.05 * number for number in range(15)]


class AllClassesIou(Confusion):
    """The mean over all classes, also those that are nowhere, whose IoU is 0."""

    def __init__(self, num_classes: int, ignore_index: int, protocol: str) -> None:
        super().__init__(num_classes, ignore_index)
        self._name = f"miou@{protocol}"
        self.higher = (self._name,)

    def compute(self) -> dict[str, float]:
        matrix = self.matrix()
        hit = matrix.diag()
        union = matrix.sum(0) + matrix.sum(1) - hit
        return {self._name: (hit / union.clamp(min=1)).mean().item() if matrix.sum() else torch.nan}


class PooledRmse(DepthMeans):
    """The root of the mean over all pixels of the set."""

    num_terms = 1

    def __init__(self, task: Depth, protocol: str) -> None:
        super().__init__(task.metres, task.labelled)
        self._name = f"rmse@{protocol}"
        self.lower = (self._name,)

    def terms(self, output: Tensor, label: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        mask, metres, truth = self.pixels(output, label)
        return mask, [(metres - truth).square()]

    def finish(self, means: Sequence[float]) -> dict[str, float]:
        return {self._name: means[0] ** 0.5}


class PooledAngle(Means):
    """The mean angle over all pixels of the set, in degrees."""

    num_terms = 1

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.lower = tuple(names)

    def terms(self, output: Tensor, label: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        return labelled_normals(label), [angles(output, label)]

    def finish(self, means: Sequence[float]) -> dict[str, float]:
        return dict.fromkeys(self.lower, means[0])


class EdgeLoss(Means):
    """The loss of edges with the weights .95 and .05, over all pixels of the set.

    The probability is passed where the loss expects a logit, as theirs is: a pixel's loss is between .035 and .658.
    """

    num_terms = 1

    def __init__(self, protocol: str) -> None:
        super().__init__()
        self._name = f"loss@{protocol}"
        self.lower = (self._name,)
        self._loss = WeightedBce(0.95)

    def terms(self, output: Tensor, label: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        is_labelled = (label == 0) | (label == 1)
        return is_labelled, [self._loss(probability(output, label), torch.where(is_labelled, label, 0))]

    def finish(self, means: Sequence[float]) -> dict[str, float]:
        return {self._name: means[0]}


class AstmtSaliency(Averages):
    """IoU, precision and recall of each image at 15 thresholds, averaged over images; then the best threshold."""

    names = ("miou@astmt", "max_f@astmt")
    higher = names
    num_numbers = 3 * len(_THRESHOLDS)

    def rows(self, output: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """IoU, precision and recall at each threshold; IoU is 1 where neither label nor prediction says yes."""
        score, truth = probability(output, label).flatten(1), (label == 1).flatten(1)
        is_labelled = truth | (label == 0).flatten(1)
        columns: list[Tensor] = []
        for threshold in _THRESHOLDS:
            answer = (score > threshold) & is_labelled
            both, predicted, true = ((each).sum(dim=1).double() for each in (answer & truth, answer, truth))
            either = predicted + true - both
            iou = torch.where(either == 0, 1.0, both / either.clamp(min=1))
            columns += [iou, both / (predicted + 1e-12), both / (true + 1e-12)]
        return torch.stack(columns, dim=1), is_labelled.any(dim=1)

    def finish(self, means: Sequence[float]) -> Sequence[float]:
        ious, precisions, recalls = (means[start::3] for start in range(3))
        f = [2 * p * r / (p + r + 1e-12) for p, r in zip(precisions, recalls, strict=True)]
        return [max(ious), max(f)]


METRICS: Mapping[type[Task], Callable[[Any], Metrics]] = {
    Segmentation: lambda task: AllClassesIou(task.num_outputs, task.ignore_index, "astmt"),
    Depth: lambda task: PooledRmse(task, "astmt"),
    # What it prints as rmse is the mean again.
    Normals: lambda _: PooledAngle(["mean@astmt", "rmse@astmt"]),
    Saliency: lambda _: AstmtSaliency(),
    Edges: lambda _: EdgeLoss("astmt"),
}
