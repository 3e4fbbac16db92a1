"""What MTAN (Liu et al., arXiv 1803.10704) and code bases after it print: CAGrad, Nash-MTL, FAMO, FairGrad.

Depth and normals are averaged over each batch, then over batches: the printed median is a mean of medians, and the
numbers depend on `data.batch_size` (2 for NYUv2, 8 for Cityscapes there) and, with several processes, on their number.
A batch without any label is left out, where their code divides by 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mtl.tasks.base import Task
from mtl.tasks.confusion import Confusion
from mtl.tasks.depth import Depth
from mtl.tasks.metrics import Metrics
from mtl.tasks.normals import Normals
from mtl.tasks.normals_losses import angles, labelled_normals
from mtl.tasks.protocols.averages import Averages, mean_where
from mtl.tasks.segmentation import Segmentation


class MtanSegmentation(Confusion):
    """From one confusion matrix of the whole set."""

    higher = ("miou@mtan", "pixel_accuracy@mtan")

    def compute(self) -> dict[str, float]:
        """`miou`: NaN if a class is neither in labels nor predictions, as theirs."""
        matrix = self.matrix()
        hit = matrix.diag()
        iou = hit / (matrix.sum(0) + matrix.sum(1) - hit)
        return {"miou@mtan": iou.mean().item(), "pixel_accuracy@mtan": (hit.sum() / matrix.sum()).item()}


class MtanDepth(Averages):
    """Absolute and relative error of each batch."""

    names = ("abs_err@mtan", "rel_err@mtan")
    lower = names
    num_numbers = 2

    def __init__(self, task: Depth) -> None:
        super().__init__()
        self._task = task

    def rows(self, output: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        mask = self._task.labelled(label)[None]
        truth = torch.where(mask, label, 1).double()
        error = (self._task.metres(output.double()) - truth).abs()
        row = torch.stack([mean_where(error, mask), mean_where(error / truth, mask)], dim=1)
        return row, mask.flatten(1).any(dim=1)


class MtanNormals(Averages):
    """Angles of each batch, in degrees."""

    names = ("mean@mtan", "median@mtan", "within_11@mtan", "within_22@mtan", "within_30@mtan")
    lower, higher = names[:2], names[2:]
    num_numbers = 5

    def rows(self, output: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        mask, angle = labelled_normals(label)[None], angles(output, label)[None]
        shares = [mean_where((angle < limit).double(), mask) for limit in (11.25, 22.5, 30.0)]
        row = torch.stack([mean_where(angle, mask), _median(angle, mask)[None], *shares], dim=1)
        return row, mask.flatten(1).any(dim=1)


def _median(values: Tensor, mask: Tensor) -> Tensor:
    """The median where `mask`, a scalar: of an even number of values, the mean of the two in the middle; no sync."""
    ordered = torch.where(mask, values, torch.inf).flatten().sort().values
    num = mask.sum()
    middle = torch.stack([(num - 1).clamp(min=0) // 2, num // 2])
    return ordered.gather(0, middle).mean()


METRICS: Mapping[type[Task], Callable[[Any], Metrics]] = {
    Segmentation: lambda task: MtanSegmentation(task.num_outputs, task.ignore_index),
    Depth: MtanDepth,
    Normals: lambda _: MtanNormals(),
}
