"""The task types: head output, loss and metrics of each."""

from __future__ import annotations

from mtl.config import (
    ClassificationConfig,
    ConfigError,
    DepthConfig,
    NormalsConfig,
    OwnTaskConfig,
    RunConfig,
    SegmentationConfig,
    SettingError,
    mistake_of,
)
from mtl.config.own import make_own, own_class
from mtl.tasks.base import Goal, Metrics, Task
from mtl.tasks.classes import Classification, Segmentation
from mtl.tasks.geometry import Depth, Normals
from mtl.tasks.kinds import label_kinds

__all__ = [
    "Classification",
    "Depth",
    "Goal",
    "Metrics",
    "Normals",
    "Segmentation",
    "Task",
    "build_tasks",
    "label_kinds",
]


def build_tasks(config: RunConfig) -> dict[str, Task]:
    """The tasks of a configuration, by name, in its order.

    Raises:
        ConfigError: A class of the user's own cannot be had, or does not take its options; for all tasks at once.
    """
    tasks, mistakes = {}, list[str]()
    for name in config.tasks:
        try:
            tasks[name] = _build(config, name)
        except SettingError as error:
            mistakes += mistake_of(config, error).mistakes
    if mistakes:
        raise ConfigError(mistakes)
    return tasks


def _build(config: RunConfig, name: str) -> Task:
    match config.tasks[name]:
        case SegmentationConfig() as own:
            return Segmentation(own.num_classes, own.ignore_index, own.balance_power)
        case ClassificationConfig() as own:
            return Classification(own.num_classes, own.ignore_index)
        case DepthConfig():
            return Depth()
        case NormalsConfig():
            return Normals()
        case OwnTaskConfig() as own:
            return _build_own(f"tasks.{name}", own)


def _build_own(path: str, own: OwnTaskConfig) -> Task:
    kind = own_class(own.type, f"{path}.type", Task)
    task: Task = make_own(kind, own.options, f"{path}.options", own.type)
    for attribute in ("output", "goal", "num_outputs"):
        if not hasattr(task, attribute):
            raise SettingError(f"{path}.type", f"{own.type} has no {attribute!r}, which every task has")
    return task
