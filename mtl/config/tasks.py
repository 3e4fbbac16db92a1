"""The `tasks` component of a configuration: one model for each type of task."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Tag, field_validator, model_validator
from pydantic_core import PydanticCustomError

from mtl.config.head import HeadConfig
from mtl.config.optim import word_for
from mtl.config.own import OWN, chosen_by
from mtl.config.teacher import TeacherConfig
from mtl.config.types import Positive, Strict, one_as_list

NumClasses = Annotated[int, Field(ge=2, le=2**20)]


class LossConfig(Strict):
    """The loss of an entry (an image, a pixel or an attribute).

    Attributes:
        name: One of the task type's losses, see docs/tasks.md; or your own, a subclass of `mtl.tasks.Loss`, as
            `package.module:Name`, see docs/own_loss.md.
        options: Passed to the loss.
    """

    name: str
    options: dict[str, Any] = {}


class MetricConfig(Strict):
    """Metrics besides the task type's own.

    Attributes:
        name: One of those that the task type offers, see docs/tasks.md; or your own, a subclass of `mtl.tasks.Metrics`,
            as `package.module:Name`.
        options: Passed to a class of your own.
    """

    name: str
    options: dict[str, Any] = {}


class _OneTaskConfig(Strict):
    """A task.

    Attributes:
        type: The task type.
        label: The label of the data set that it learns, which other tasks may learn too; if not set, that of its name.
        data: The sets of `data.name: mixed` that it learns from; if not set, all that have its label.
        head: What gives its output; a name alone is short for `{name: ...}`. If not set, `fpn` for an output per pixel,
            `linear` for one per image.
        metrics: Metrics besides the task type's own.
        unlabelled: Whether the data has no label of it: the model has its head, whose weights `init_from` gives, and no
            image trains or measures it. Refused with `label` and `data`.
    """

    type: str
    label: Annotated[str, Field(min_length=1)] | None = None
    data: Annotated[list[str], BeforeValidator(one_as_list), Field(min_length=1)] | None = None
    head: Annotated[HeadConfig, word_for("name")] | None = None
    metrics: Annotated[list[Annotated[MetricConfig, word_for("name")]], BeforeValidator(one_as_list)] = []
    unlabelled: bool = False

    @model_validator(mode="after")
    def _reads_no_label_if_it_has_none(self) -> _OneTaskConfig:
        for key in ("label", "data") if self.unlabelled else ():
            if getattr(self, key) is not None:
                raise PydanticCustomError("task", f"Input should have no {key} if it is unlabelled")
        return self


class _WithLossConfig(_OneTaskConfig):
    """A task of a type of this project.

    Attributes:
        loss: The loss; if not set, the first of the task type's in docs/tasks.md.
    """

    loss: Annotated[LossConfig, word_for("name")] | None = None


class _WithClassesConfig(_WithLossConfig):
    """A task whose classes or attributes may have names.

    Attributes:
        class_names: The names of its classes in order. Refused unless it is `unlabelled`: else the data set names them.
    """

    class_names: Annotated[list[str], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _data_names_classes(self) -> _WithClassesConfig:
        if self.class_names is not None and not self.unlabelled:
            raise PydanticCustomError("task", "Input should have class_names only if it is unlabelled")
        return self


class SegmentationConfig(_WithClassesConfig):
    """A class per pixel.

    Attributes:
        type: The task type.
        num_classes: Number of classes; labels are 0 to `num_classes` - 1. If not set, what the data set says.
        ignore_index: The label of pixels that count neither in the loss nor in the metrics.
        balance_power: In the loss, a class weighs its frequency to the power of minus this; 0 weighs all pixels the
            same. Refused with a loss that has `class_weights` of its own, or is one number for each image.
    """

    type: Literal["segmentation"]
    num_classes: NumClasses | None = None
    ignore_index: int = 255
    balance_power: Annotated[float, Field(ge=0, le=1)] = 0.5


class DepthConfig(_WithLossConfig):
    """Metres per pixel.

    Attributes:
        type: The task type.
        space: What the head outputs: log metres (`log`), metres (`linear`), or logits of bins of depth (`bins`).
        min: Metres below which a label is none; metrics raise predictions to it. Required by `bins`.
        max: Metres above which a label is none; metrics lower predictions to it. Required by `bins`.
        num_bins: Number of bins of `bins`, which is 64 if not set; refused in another space.
    """

    type: Literal["depth"]
    space: Literal["log", "linear", "bins"] = "log"
    min: Positive | None = None
    max: Positive | None = None
    num_bins: Annotated[int, Field(ge=2, le=2**12)] | None = None

    @model_validator(mode="after")
    def _bounds_fit(self) -> DepthConfig:
        if self.space == "bins" and (self.min is None or self.max is None):
            raise PydanticCustomError("depth", "Input should have min and max with the space 'bins'")
        if self.space != "bins" and self.num_bins is not None:
            raise PydanticCustomError("depth", "Input should have num_bins only with the space 'bins'")
        if self.min is not None and self.max is not None and self.min >= self.max:
            raise PydanticCustomError("depth", "Input should have a min below max")
        return self


class NormalsConfig(_WithLossConfig):
    """A unit surface normal per pixel.

    Attributes:
        type: The task type.
    """

    type: Literal["normals"]


class ClassificationConfig(_WithClassesConfig):
    """A class per image.

    Attributes:
        type: The task type.
        num_classes: Number of classes; labels are 0 to `num_classes` - 1. If not set, what the data set says.
        ignore_index: The label of images that count neither in the loss nor in the metrics.
    """

    type: Literal["classification"]
    num_classes: NumClasses | None = None
    ignore_index: int = -1


class OrdinalConfig(_WithClassesConfig):
    """One of several classes that have an order, per image.

    Attributes:
        type: The task type.
        num_classes: Number of classes; labels are 0 to `num_classes` - 1, in their order. If not set, what the data set
            says.
        ignore_index: The label of images that count neither in the loss nor in the metrics.
    """

    type: Literal["ordinal"]
    num_classes: NumClasses | None = None
    ignore_index: int = -1


class MultiLabelConfig(_WithClassesConfig):
    """Attributes of an image, each of which it has or has not; NaN is no label.

    Attributes:
        type: The task type.
        num_classes: Number of attributes. If not set, what the data set says.
    """

    type: Literal["multilabel"]
    num_classes: Annotated[int, Field(ge=1, le=2**20)] | None = None


class RegressionConfig(_WithLossConfig):
    """Numbers of an image; NaN is no label.

    Attributes:
        type: The task type.
        num_outputs: How many numbers.
        scale: The unit in which the head's output and the loss are, in those of the label: about the spread of the
            labels. Metrics are in the label's own unit.
    """

    type: Literal["regression"]
    num_outputs: Annotated[int, Field(ge=1, le=2**20)] = 1
    scale: Positive = 1.0


class EdgesConfig(_WithLossConfig):
    """Whether each pixel is one of an edge: 1 or 0.

    Attributes:
        type: The task type.
        ignore_index: The label of pixels that count neither in the loss nor in the metrics.
    """

    type: Literal["edges"]
    ignore_index: int = 255


class SaliencyConfig(_WithLossConfig):
    """Whether each pixel is one of what draws the eye: 1 or 0.

    Attributes:
        type: The task type.
        ignore_index: The label of pixels that count neither in the loss nor in the metrics.
    """

    type: Literal["saliency"]
    ignore_index: int = 255


class KeypointsConfig(_WithLossConfig):
    """The places of named points in an image.

    Attributes:
        type: The task type.
        num_points: How many points.
    """

    type: Literal["keypoints"]
    num_points: Annotated[int, Field(ge=1, le=2**12)]


class DistillConfig(_WithLossConfig):
    """The embedding that a frozen teacher gives of each image.

    Attributes:
        type: The task type.
        label: Refused: what is learned is the teacher's, and no label of the data set is read.
        unlabelled: Refused: the teacher gives labels of any image.
        teacher: Whose embedding is learned.
    """

    type: Literal["distill"]
    teacher: TeacherConfig

    @field_validator("label", mode="after")
    @classmethod
    def _has_no_label(cls, _: str) -> str:
        raise PydanticCustomError("label", "Input should have no label: what is learned is the teacher's")

    @field_validator("unlabelled", mode="after")
    @classmethod
    def _is_labelled(cls, unlabelled: bool) -> bool:
        if unlabelled:
            raise PydanticCustomError("label", "Input should be false: the teacher gives labels of any image")
        return unlabelled


class OwnTaskConfig(_OneTaskConfig):
    """A task type of your own; see docs/own_task.md.

    Attributes:
        type: A subclass of `mtl.tasks.Task`, as `package.module:Name`.
        options: Passed to the class.
    """

    type: str
    options: dict[str, Any] = {}


TaskConfig = Annotated[
    Annotated[SegmentationConfig, Tag("segmentation")]
    | Annotated[DepthConfig, Tag("depth")]
    | Annotated[NormalsConfig, Tag("normals")]
    | Annotated[ClassificationConfig, Tag("classification")]
    | Annotated[OrdinalConfig, Tag("ordinal")]
    | Annotated[MultiLabelConfig, Tag("multilabel")]
    | Annotated[RegressionConfig, Tag("regression")]
    | Annotated[EdgesConfig, Tag("edges")]
    | Annotated[SaliencyConfig, Tag("saliency")]
    | Annotated[KeypointsConfig, Tag("keypoints")]
    | Annotated[DistillConfig, Tag("distill")]
    | Annotated[OwnTaskConfig, Tag(OWN)],
    chosen_by("type", stand_in="depth"),
]
