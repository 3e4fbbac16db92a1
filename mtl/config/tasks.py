"""The `tasks` component of a configuration: one model for each type of task."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mtl.config.types import Strict


class SegmentationConfig(Strict):
    """A class per pixel.

    Attributes:
        num_classes: How many classes the labels have.
        ignore_index: Label of pixels that do not count.
        balance_power: Classes weigh frequency ** -balance_power in the loss; 0 weighs all pixels alike.
    """

    type: Literal["segmentation"]
    num_classes: Annotated[int, Field(ge=2, le=2**20)]
    ignore_index: int = 255
    balance_power: Annotated[float, Field(ge=0, le=1)] = 0.5


class DepthConfig(Strict):
    """Metres per pixel."""

    type: Literal["depth"]


class NormalsConfig(Strict):
    """A unit normal per pixel."""

    type: Literal["normals"]


class ClassificationConfig(Strict):
    """A class per image.

    Attributes:
        num_classes: How many classes the labels have.
        ignore_index: Label of images that do not count.
    """

    type: Literal["classification"]
    num_classes: Annotated[int, Field(ge=2, le=2**20)]
    ignore_index: int = -1


TaskConfig = Annotated[
    SegmentationConfig | DepthConfig | NormalsConfig | ClassificationConfig, Field(discriminator="type")
]
