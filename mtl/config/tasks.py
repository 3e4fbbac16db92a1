"""The `tasks` component of a configuration: one model for each type of task."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mtl.config.types import Strict


class SegmentationConfig(Strict):
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


class DepthConfig(Strict):
    """Metres per pixel.

    Attributes:
        type: The task type.
    """

    type: Literal["depth"]


class NormalsConfig(Strict):
    """A unit surface normal per pixel.

    Attributes:
        type: The task type.
    """

    type: Literal["normals"]


class ClassificationConfig(Strict):
    """A class per image.

    Attributes:
        type: The task type.
        num_classes: Number of classes; labels are 0 to `num_classes` - 1.
        ignore_index: The label of images that count neither in the loss nor in the metrics.
    """

    type: Literal["classification"]
    num_classes: Annotated[int, Field(ge=2, le=2**20)]
    ignore_index: int = -1


TaskConfig = Annotated[
    SegmentationConfig | DepthConfig | NormalsConfig | ClassificationConfig, Field(discriminator="type")
]
