"""What kind of label each task of a configuration learns, before the task is made."""

from __future__ import annotations

from typing import Any

from mtl.config import OwnTaskConfig, RunConfig, SettingError, mistake_of
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


def label_kinds(config: RunConfig) -> dict[str, LabelKind]:
    """The kind of each label that tasks learn, by the data set's name for it.

    Of tasks that share a label, the first one that does not take plain numbers decides.

    Raises:
        ConfigError: A task type of the user's own cannot be had.
    """
    kinds: dict[str, LabelKind] = {}
    for name, own in config.tasks.items():
        label, kind = own.label or name, _kind_of(config, name)
        if kinds.get(label, "numbers") == "numbers":
            kinds[label] = kind
    return kinds


def _kind_of(config: RunConfig, name: str) -> LabelKind:
    own = config.tasks[name]
    if not isinstance(own, OwnTaskConfig):
        type_ = _TYPES[own.type]
    else:
        try:
            type_ = own_class(own.type, f"tasks.{name}.type", Task)
        except SettingError as error:
            raise mistake_of(config, error) from error
    said: Any = type_.label_kind
    # A class that says nothing has the base's property, which asks the object.
    plain: LabelKind = "mask" if getattr(type_, "output", None) == "dense" else "numbers"
    return said if isinstance(said, str) else plain  # type: ignore[return-value]
