"""Opens the data set of a run; what it lacks is blamed on the tasks that want it."""

from __future__ import annotations

from mtl.config import ConfigError, RunConfig, SettingError, mistake_of
from mtl.data import LabelError, Source, open_data
from mtl.runtime.text import hint
from mtl.tasks import labels_of


def open_source(config: RunConfig) -> Source:
    """Opens the data set of a run.

    Raises:
        ConfigError: It cannot be had, or has no label that a task learns.
        DataError: Something of it cannot be read.
    """
    try:
        source = open_data(config)
    except SettingError as error:
        raise mistake_of(config, error) from error
    except LabelError as error:
        found = [[line] if label is None else _at_tasks(config, label, line) for label, line in error.lines]
        raise ConfigError([line for lines in found for line in lines]) from error
    there_are = {label: source.labels_of(task) for task, label in labels_of(config).items()}
    mistakes = list[str]()
    for label, labels in there_are.items():
        if label not in labels:
            there = f"it has: {', '.join(labels)}{hint(label, labels)}"
            mistakes += _at_tasks(config, label, f"{config.data.name} has no label {label!r}; {there}")
    if mistakes:
        raise ConfigError(mistakes)
    return source


def _at_tasks(config: RunConfig, label: str, message: str) -> list[str]:
    """Mistakes about a label, at each task that learns it."""
    lines = list[str]()
    for task, own in config.tasks.items():
        if own.unlabelled:
            continue
        if own.label == label:
            lines += config.mistake(("tasks", task, "label"), message).mistakes
        elif own.label is None and task == label:
            elsewhere = "; if the task has another name than its label, set label"
            lines += config.mistake(("tasks", task), f"{message}{elsewhere}").mistakes
    return lines
