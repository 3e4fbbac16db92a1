"""The task types: head output, loss and metrics of each."""

from __future__ import annotations

from collections.abc import Mapping

from mtl.config import ClassificationConfig, DepthConfig, NormalsConfig, SegmentationConfig, TaskConfig
from mtl.tasks.base import Goal, Metrics, Task
from mtl.tasks.classes import Classification, Segmentation
from mtl.tasks.geometry import Depth, Normals

__all__ = ["Classification", "Depth", "Goal", "Metrics", "Normals", "Segmentation", "Task", "build_tasks"]


def build_tasks(configs: Mapping[str, TaskConfig]) -> dict[str, Task]:
    """The tasks of a configuration, by name, in its order."""
    return {name: _build(config) for name, config in configs.items()}


def _build(config: TaskConfig) -> Task:
    match config:
        case SegmentationConfig():
            return Segmentation(config.num_classes, config.ignore_index, config.balance_power)
        case ClassificationConfig():
            return Classification(config.num_classes, config.ignore_index)
        case DepthConfig():
            return Depth()
        case NormalsConfig():
            return Normals()
