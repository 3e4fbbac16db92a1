"""The `tasks` component of a configuration: one model for each type of task."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from mtl.config.head import HeadConfig
from mtl.config.optim import word_for
from mtl.config.types import Strict


class _OneTaskConfig(Strict):
    """A task.

    Attributes:
        type: The task type.
        label: The label of the data set that it learns, which other tasks may learn too; if not set, that of its name.
        head: What gives its output; a name alone is short for `{name: ...}`. If not set, `fpn` for an output per pixel,
            `linear` for one per image.
    """

    type: str
    label: Annotated[str, Field(min_length=1)] | None = None
    head: Annotated[HeadConfig, word_for("name")] | None = None


class SegmentationConfig(_OneTaskConfig):
    """A class per pixel.

    Attributes:
        type: The task type.
        num_classes: Number of classes; labels are 0 to `num_classes` - 1.
        ignore_index: The label of pixels that count neither in the loss nor in the metrics.
        balance_power: In the loss, a class weighs its frequency to the power of minus this; 0 weighs all pixels the
            same.
    """

    type: Literal["segmentation"]
    num_classes: Annotated[int, Field(ge=2, le=2**20)]
    ignore_index: int = 255
    balance_power: Annotated[float, Field(ge=0, le=1)] = 0.5


class DepthConfig(_OneTaskConfig):
    """Metres per pixel.

    Attributes:
        type: The task type.
    """

    type: Literal["depth"]


class NormalsConfig(_OneTaskConfig):
    """A unit surface normal per pixel.

    Attributes:
        type: The task type.
    """

    type: Literal["normals"]


class ClassificationConfig(_OneTaskConfig):
    """A class per image.

    Attributes:
        type: The task type.
        num_classes: Number of classes; labels are 0 to `num_classes` - 1.
        ignore_index: The label of images that count neither in the loss nor in the metrics.
    """

    type: Literal["classification"]
    num_classes: Annotated[int, Field(ge=2, le=2**20)]
    ignore_index: int = -1


class OwnTaskConfig(_OneTaskConfig):
    """A task type of your own; see docs/own_task.md.

    Attributes:
        type: A subclass of `mtl.tasks.Task`, as `package.module:Name`.
        options: Passed to the class.
    """

    type: str
    options: dict[str, Any] = {}


_OWN = "package.module:Name"


def _by_type(value: Any) -> str | None:
    """Which of the models below a task is; a word that is no type is none of them."""
    # What is neither a mapping nor a model, any of them refuses.
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", "depth")
    return _OWN if isinstance(kind, str) and ":" in kind else None if kind is None else str(kind)


TaskConfig = Annotated[
    Annotated[SegmentationConfig, Tag("segmentation")]
    | Annotated[DepthConfig, Tag("depth")]
    | Annotated[NormalsConfig, Tag("normals")]
    | Annotated[ClassificationConfig, Tag("classification")]
    | Annotated[OwnTaskConfig, Tag(_OWN)],
    Discriminator(_by_type),
]
