"""What InvPT (Ye and Xu, arXiv 2203.07997) prints, and code bases after it: TaskPrompter, MTMamba."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from mtl.tasks.base import Task
from mtl.tasks.binary_maps import Edges, Saliency
from mtl.tasks.depth import Depth
from mtl.tasks.metrics import Metrics
from mtl.tasks.normals import Normals
from mtl.tasks.protocols.astmt import AllClassesIou, EdgeLoss, PooledAngle, PooledRmse
from mtl.tasks.segmentation import Segmentation
from mtl.tasks.thresholds import MaxF


class InvptMaxF(MaxF):
    """The pooled F with beta squared 0.3, of thresholds on the sigmoid of the probability.

    That lies between .5 and .731, so that only the thresholds .55 to .7 decide; `max_f` has them on the probability.
    """

    def __init__(self) -> None:
        super().__init__([number / 20 for number in range(1, 20)], beta_squared=0.3, name="max_f@invpt")

    def score(self, output: Tensor, label: Tensor) -> Tensor:
        return super().score(output, label).sigmoid()


METRICS: Mapping[type[Task], Callable[[Any], Metrics]] = {
    Segmentation: lambda task: AllClassesIou(task.num_outputs, task.ignore_index, "invpt"),
    Depth: lambda task: PooledRmse(task, "invpt"),
    Normals: lambda _: PooledAngle(["mean@invpt"]),
    Saliency: lambda _: InvptMaxF(),
    Edges: lambda _: EdgeLoss("invpt"),
}
