"""The task types: head output, loss and metrics of each."""

from __future__ import annotations

from mtl.tasks.base import Goal, Task
from mtl.tasks.binary_maps import Edges, Saliency
from mtl.tasks.build import build_tasks
from mtl.tasks.classification import Classification
from mtl.tasks.depth import Depth
from mtl.tasks.distill import Distill
from mtl.tasks.keypoints import Keypoints
from mtl.tasks.kinds import label_kinds, labels_of
from mtl.tasks.loss import Loss
from mtl.tasks.metrics import Metrics
from mtl.tasks.multilabel import MultiLabel
from mtl.tasks.normals import Normals
from mtl.tasks.ordinal import Ordinal
from mtl.tasks.regression import Regression
from mtl.tasks.segmentation import Segmentation

__all__ = [
    "Classification",
    "Depth",
    "Distill",
    "Edges",
    "Goal",
    "Keypoints",
    "Loss",
    "Metrics",
    "MultiLabel",
    "Normals",
    "Ordinal",
    "Regression",
    "Saliency",
    "Segmentation",
    "Task",
    "build_tasks",
    "label_kinds",
    "labels_of",
]
