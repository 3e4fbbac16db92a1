"""The metrics of depth of Eigen et al. (arXiv 1406.2283) in their crop, of each image, then averaged over images.

Depths between 1 mm and 10 m count, and predictions are limited to these. There is no scaling to the median, which is
for depth without labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mtl.tasks.base import Task
from mtl.tasks.depth import Depth
from mtl.tasks.metrics import Metrics
from mtl.tasks.protocols.averages import Averages, mean_where

_NEAR, _FAR = 1e-3, 10.0
# The part of NYUv2's 480 x 640 pixels that has depth: first and last row, first and last column.
_SIZE, _ROWS, _COLUMNS = (480, 640), (45, 471), (41, 601)


class Eigen(Averages):
    """Of each image: shares within 1.25, its square and cube, and the errors."""

    names = tuple(
        f"{name}@eigen" for name in ("delta1", "delta2", "delta3", "abs_rel", "rmse", "rmse_log", "log10", "silog")
    )
    higher, lower = names[:3], names[3:]
    num_numbers = 8

    def __init__(self, task: Depth) -> None:
        super().__init__()
        self._task = task

    def rows(self, output: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """`silog` is 100 times the standard deviation of an image's log errors."""
        top, bottom = (round(each * label.shape[2] / _SIZE[0]) for each in _ROWS)
        left, right = (round(each * label.shape[3] / _SIZE[1]) for each in _COLUMNS)
        label = label[..., top:bottom, left:right]
        metres = self._task.metres(output.double())[..., top:bottom, left:right].clamp(_NEAR, _FAR)
        mask = self._task.labelled(label) & (label > _NEAR) & (label < _FAR)
        truth = torch.where(mask, label, 1).double()
        ratio, log = torch.maximum(metres / truth, truth / metres), metres.log() - truth.log()
        mean_log, square_log = mean_where(log, mask), mean_where(log.square(), mask)
        numbers = [mean_where((ratio < 1.25**power).double(), mask) for power in (1, 2, 3)]
        numbers += [
            mean_where((metres - truth).abs() / truth, mask),
            mean_where((metres - truth).square(), mask).sqrt(),
            square_log.sqrt(),
            mean_where((metres.log10() - truth.log10()).abs(), mask),
            100 * (square_log - mean_log.square()).clamp(min=0).sqrt(),
        ]
        return torch.stack(numbers, dim=1), mask.flatten(1).any(dim=1)


METRICS: Mapping[type[Task], Callable[[Any], Metrics]] = {Depth: Eigen}
