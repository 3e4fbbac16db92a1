"""The task types: head output, loss and metrics of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mtl.config import (
    ClassificationConfig,
    ConfigError,
    DepthConfig,
    NormalsConfig,
    OwnTaskConfig,
    RunConfig,
    SegmentationConfig,
    options_of,
)
from mtl.runtime.plugin import PluginError, find_class, where_it_failed
from mtl.tasks.base import Goal, Metrics, Task
from mtl.tasks.classes import Classification, Segmentation
from mtl.tasks.geometry import Depth, Normals

__all__ = ["Classification", "Depth", "Goal", "Metrics", "Normals", "Segmentation", "Task", "build_tasks"]


def build_tasks(config: RunConfig) -> dict[str, Task]:
    """The tasks of a configuration, by name, in its order.

    Raises:
        ConfigError: A class of the user's own cannot be had, or does not take its options; for all tasks at once.
    """
    tasks, mistakes = {}, list[str]()
    for name in config.tasks:
        try:
            tasks[name] = _build(config, name)
        except ConfigError as error:
            mistakes += error.mistakes
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
            return _build_own(config, ("tasks", name), own)


def _build_own(config: RunConfig, path: tuple[str, ...], own: OwnTaskConfig) -> Task:
    try:
        kind: type[Task] = find_class(own.type, Task)
    except PluginError as error:
        raise config.mistake((*path, "type"), str(error)) from error
    options: Mapping[str, Any] = own.options
    if kind.Options is not None:
        options = dict(options_of(config, (*path, "options"), kind.Options, options))
    try:
        task = kind(**options)
    except Exception as error:  # the user's code may raise anything
        raise config.mistake((*path, "options"), f"{own.type}: {where_it_failed(error)}") from error
    for attribute in ("output", "goal", "num_outputs"):
        if not hasattr(task, attribute):
            raise config.mistake((*path, "type"), f"{own.type} has no {attribute!r}, which every task has")
    return task
