"""The `data.transform` component: joint changes of images and labels, by name with options."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from mtl.config.optim import word_for
from mtl.config.own import OWN, chosen_by
from mtl.config.types import NotNegative, Positive, Strict


class CropOptions(Strict):
    """Which part of an image a random crop shows.

    Attributes:
        scale: The smallest and the largest share of the image's area.
        ratio: The smallest and the largest ratio of the part's width to its height, in pixels of the image.
    """

    scale: list[Annotated[float, Field(gt=0, le=1)]] = [0.08, 1.0]
    ratio: list[Positive] = [3 / 4, 4 / 3]

    @model_validator(mode="after")
    def _in_order(self) -> CropOptions:
        for name, bounds in (("scale", self.scale), ("ratio", self.ratio)):
            if len(bounds) != 2 or bounds[0] > bounds[1]:
                raise PydanticCustomError("transform", f"Input should have {name} as [smallest, largest]")
        return self


class FlipOptions(Strict):
    """How often, and what is left and right.

    Attributes:
        p: The probability with which an image is flipped.
        pairs: Points that are each other's mirror image, such as the left and the right eye, by their places from 0 on:
            a flip swaps them. For every label of points.
    """

    p: Annotated[float, Field(ge=0, le=1)] = 0.5
    pairs: list[list[Annotated[int, Field(ge=0)]]] = []

    @model_validator(mode="after")
    def _each_once(self) -> FlipOptions:
        places = [place for pair in self.pairs for place in pair]
        if len(set(places)) < len(places) or any(len(pair) != 2 for pair in self.pairs):
            raise PydanticCustomError("transform", "Input should have pairs such as [0, 1], each point in one only")
        return self


class ScaleOptions(Strict):
    """How much an image is enlarged.

    Attributes:
        factors: One of them is drawn for each image. Depth is divided by it.
    """

    factors: Annotated[list[Annotated[float, Field(ge=1, le=100)]], Field(min_length=1)] = [1.0, 1.2, 1.5]


class RotationOptions(Strict):
    """How far an image is turned, and what fills its corners.

    Attributes:
        degrees: The largest angle, to either side.
        ignore: The class of pixels of a mask that come from outside the image. It has to be the `ignore_index` of the
            tasks that learn a mask.
        normals_y: Where the second axis of normals points, `up` or `down` in the image.
    """

    degrees: Annotated[float, Field(gt=0, le=180)]
    ignore: int = 255
    normals_y: Literal["up", "down"] = "up"


class ColourOptions(Strict):
    """How far colours change; one of the keys has to be above 0.

    Attributes:
        brightness: Values are multiplied by a factor between 1 minus and 1 plus this number.
        contrast: The same of the distance from the mean of the grey image.
        saturation: The same of the distance from the pixel's grey value.
        hue: The hue is turned by up to this part of a full circle, to either side.
    """

    brightness: NotNegative = 0.0
    contrast: NotNegative = 0.0
    saturation: NotNegative = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0

    @model_validator(mode="after")
    def _changes_something(self) -> ColourOptions:
        if not (self.brightness or self.contrast or self.saturation or self.hue):
            raise PydanticCustomError("transform", "Input should have brightness, contrast, saturation or hue above 0")
        return self


class ResizeConfig(Strict):
    """Resizes the whole image to `data.image_size`, which is done at the end in any case.

    Attributes:
        name: The transform.
    """

    name: Literal["resize"]


class CropConfig(Strict):
    """Shows a random part of the image, resized to `data.image_size` (Szegedy et al., arXiv 1409.4842).

    Attributes:
        name: The transform.
        options: Its options.
    """

    name: Literal["random_resized_crop"]
    options: CropOptions = CropOptions()


class FlipConfig(Strict):
    """Swaps left and right.

    Attributes:
        name: The transform.
        options: Its options.
    """

    name: Literal["flip"]
    options: FlipOptions = FlipOptions()


class ScaleConfig(Strict):
    """Enlarges the image and shows a random part of it that has the old size (Eigen et al., arXiv 1406.2283).

    Attributes:
        name: The transform.
        options: Its options.
    """

    name: Literal["scale"]
    options: ScaleOptions = ScaleOptions()


class RotationConfig(Strict):
    """Turns the image about its centre by a random angle.

    Attributes:
        name: The transform.
        options: Its options.
    """

    name: Literal["rotation"]
    options: RotationOptions


class ColourConfig(Strict):
    """Changes the colours of the image at random, in random order; of images with 1 or 3 channels.

    Attributes:
        name: The transform.
        options: Its options.
    """

    name: Literal["colour"]
    options: ColourOptions


class OwnTransformConfig(Strict):
    """A transform of torchvision's v2, or your own; see docs/transforms.md.

    Attributes:
        name: Its class as `package.module:Name`, such as `torchvision.transforms.v2:GaussianBlur`.
        options: Passed to the class.
    """

    name: str
    options: dict[str, Any] = {}


TransformConfig = Annotated[
    Annotated[ResizeConfig, Tag("resize")]
    | Annotated[CropConfig, Tag("random_resized_crop")]
    | Annotated[FlipConfig, Tag("flip")]
    | Annotated[ScaleConfig, Tag("scale")]
    | Annotated[RotationConfig, Tag("rotation")]
    | Annotated[ColourConfig, Tag("colour")]
    | Annotated[OwnTransformConfig, Tag(OWN)],
    chosen_by("name", stand_in="resize"),
    word_for("name"),
]


class TransformsConfig(Strict):
    """Changes of images and their labels together, in the order of the list; see docs/transforms.md.

    Attributes:
        train: Those of training images, drawn afresh in every epoch.
        val: Those of validation images.
    """

    train: list[TransformConfig] = []
    val: list[TransformConfig] = []
