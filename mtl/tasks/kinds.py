"""The kind of label that each task of a configuration learns, before the task is made."""

from __future__ import annotations

from typing import Any

from mtl.config import ConfigError, DistillConfig, OwnTaskConfig, RunConfig, SettingError, TaskConfig, mistake_of
from mtl.config.own import own_class
from mtl.tasks.base import LabelKind, Task
from mtl.tasks.binary_maps import Edges, Saliency
from mtl.tasks.classification import Classification
from mtl.tasks.depth import Depth
from mtl.tasks.keypoints import Keypoints
from mtl.tasks.multilabel import MultiLabel
from mtl.tasks.normals import Normals
from mtl.tasks.ordinal import Ordinal
from mtl.tasks.regression import Regression
from mtl.tasks.segmentation import Segmentation

_TYPES: dict[str, type[Task]] = {
    "segmentation": Segmentation,
    "classification": Classification,
    "ordinal": Ordinal,
    "multilabel": MultiLabel,
    "regression": Regression,
    "depth": Depth,
    "normals": Normals,
    "edges": Edges,
    "saliency": Saliency,
    "keypoints": Keypoints,
}


def labels_of(config: RunConfig) -> dict[str, str]:
    """The data set's name for the label of each task that reads one, by task.

    A teacher gives those of others, and some are `unlabelled`.
    """
    own = (each for each in config.tasks.items() if not isinstance(each[1], DistillConfig) and not each[1].unlabelled)
    return {name: task.label or name for name, task in own}


def label_kinds(config: RunConfig) -> dict[str, LabelKind]:
    """The kind of each label that tasks learn, by the data set's name for it.

    Of tasks that share a label, the first one that does not take plain numbers decides.

    Raises:
        ConfigError: A task type of the user's own cannot be had; for all tasks at once.
    """
    kinds, mistakes = dict[str, LabelKind](), list[str]()
    for name, label in labels_of(config).items():
        try:
            kind = _kind_of(config.tasks[name], f"tasks.{name}.type")
        except SettingError as error:
            mistakes += mistake_of(config, error).mistakes
            continue
        if kinds.get(label, "numbers") == "numbers":
            kinds[label] = kind
    if mistakes:
        raise ConfigError(mistakes)
    return kinds


def _kind_of(own: TaskConfig, key: str) -> LabelKind:
    type_ = own_class(own.type, key, Task) if isinstance(own, OwnTaskConfig) else _TYPES[own.type]
    declared: Any = type_.label_kind
    # A class that says nothing has the base's property, which asks the object.
    plain: LabelKind = "mask" if getattr(type_, "output", None) == "dense" else "numbers"
    return declared if isinstance(declared, str) else plain  # type: ignore[return-value]
