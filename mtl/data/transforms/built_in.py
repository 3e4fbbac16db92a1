"""The built-in transforms: what each draws, and the operation of torchvision's v2 that it applies to a sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Generator, Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from mtl.config.transform import (
    ColourConfig,
    CropConfig,
    FlipConfig,
    ResizeConfig,
    RotationConfig,
    ScaleConfig,
)
from mtl.data.cache import DataError
from mtl.data.transforms.dense import MOVES, Classes, Dense, Move, NormalMap, mirrored
from mtl.data.transforms.points import Points

IMAGE = "image"
BuiltInConfig = ResizeConfig | CropConfig | FlipConfig | ScaleConfig | RotationConfig | ColourConfig
# An image, `Image`, and its labels by name: `Classes`, `DepthMap`, `NormalMap`, `Points`, others plain tensors.
Sample = dict[str, Tensor]

_UP_TO_ONE = 255.0
_BILINEAR = v2.InterpolationMode.BILINEAR


class PipelineStep(Protocol):
    """One transform of a pipeline.

    Attributes:
        is_random: Whether what it does depends on what it draws.
    """

    is_random: bool

    def __call__(self, sample: Sample, generator: Generator) -> Sample:
        """A changed sample; the one that was passed stays as it is."""


class Resize:
    """The whole image in the given size."""

    is_random = False

    def __init__(self, size: tuple[int, int]) -> None:
        self._size = list(size)

    def __call__(self, sample: Sample, generator: Generator) -> Sample:  # noqa: ARG002  one signature for all
        return _everywhere(sample, functional.resize, size=self._size, antialias=True)


class RandomResizedCrop:
    """A part of random area and shape, resized; the whole image where none of ten is inside it."""

    is_random = True

    def __init__(self, config: CropConfig, size: tuple[int, int]) -> None:
        self._options = config.options
        self._size = list(size)

    def __call__(self, sample: Sample, generator: Generator) -> Sample:
        height, width = sample[IMAGE].shape[-2:]
        top, left, tall, wide = self._part(height, width, generator)
        return _everywhere(
            sample,
            functional.resized_crop,
            top=top,
            left=left,
            height=tall,
            width=wide,
            size=self._size,
            antialias=True,
        )

    def _part(self, height: int, width: int, generator: Generator) -> tuple[int, int, int, int]:
        """Top, left, height and width, in pixels."""
        trials = torch.rand(10, 4, generator=generator, dtype=torch.float64).tolist()
        low, high = (math.log(ratio) for ratio in self._options.ratio)
        smallest, largest = self._options.scale
        for for_area, for_ratio, down, across in trials:
            area = height * width * _between(smallest, largest, for_area)
            ratio = math.exp(_between(low, high, for_ratio))
            tall, wide = max(1, round(math.sqrt(area / ratio))), max(1, round(math.sqrt(area * ratio)))
            if tall <= height and wide <= width:
                return int(down * (height - tall + 1)), int(across * (width - wide + 1)), tall, wide
        return 0, 0, height, width


class Flip:
    """Left and right swapped."""

    def __init__(self, config: FlipConfig) -> None:
        self._options = config.options
        self.is_random = 0 < config.options.p < 1

    def __call__(self, sample: Sample, generator: Generator) -> Sample:
        if float(torch.rand((), generator=generator)) >= self._options.p:
            return sample
        flipped = _everywhere(sample, functional.horizontal_flip)
        for name, label in flipped.items():
            if isinstance(label, Points):
                flipped[name] = label.swapped(self._options.pairs)
        return flipped


class RandomScale:
    """Enlarged by one of some factors, and cropped back to its size at random.

    The crop begins and ends at the centres of pixels, so that nothing from outside the image is interpolated.
    """

    is_random = True

    def __init__(self, config: ScaleConfig) -> None:
        self._factors = config.options.factors

    def __call__(self, sample: Sample, generator: Generator) -> Sample:
        factor = self._factors[int(torch.randint(len(self._factors), (), generator=generator))]
        across, down = (2 * torch.rand(2, generator=generator, dtype=torch.float64) - 1).tolist()
        if factor == 1:
            return sample
        height, width = sample[IMAGE].shape[-2:]
        shift = [across * (factor - 1) * (width - 1) / 2, down * (factor - 1) * (height - 1) / 2]
        return _everywhere(
            sample,
            functional.affine,
            angle=0.0,
            translate=shift,
            scale=factor,
            shear=[0.0, 0.0],
            interpolation=_BILINEAR,
        )


class RandomRotation:
    """Turned about the centre by a random angle."""

    is_random = True

    def __init__(self, config: RotationConfig) -> None:
        self._options = config.options

    def __call__(self, sample: Sample, generator: Generator) -> Sample:
        part = 2 * float(torch.rand((), generator=generator, dtype=torch.float64)) - 1
        before = {
            name: value.filled_with(self._options.ignore) if isinstance(value, Classes) else self._mirrored(value)
            for name, value in sample.items()
        }
        turned = _everywhere(before, functional.rotate, angle=part * self._options.degrees, interpolation=_BILINEAR)
        return {name: self._mirrored(value) for name, value in turned.items()}

    def _mirrored(self, value: Tensor) -> Tensor:
        """Normals whose second axis points down as if it pointed up, and back."""
        if self._options.normals_y == "up" or not isinstance(value, NormalMap):
            return value
        return NormalMap.wrap(mirrored(value.as_subclass(Tensor), 1), value)


class Colour:
    """The four changes of torchvision's `ColorJitter`, in random order."""

    is_random = True

    def __init__(self, config: ColourConfig, key: str) -> None:
        self._options = config.options
        self._key = key

    def __call__(self, sample: Sample, generator: Generator) -> Sample:
        image = sample[IMAGE]
        if image.shape[0] not in (1, 3):
            raise DataError(f"{self._key}: `colour` changes images of 1 or 3 channels, got one of {image.shape[0]}")
        changes = self._draw(generator)

        def change(values: Tensor) -> Tensor:
            for operation, amount in changes:
                values = operation(values, amount)
            return values

        return sample | {IMAGE: as_torchvision_takes_it(image, change)}

    def _draw(self, generator: Generator) -> list[tuple[Callable[[Tensor, float], Tensor], float]]:
        """Operations and their factors, in the order in which they are applied."""
        options, order = self._options, torch.randperm(4, generator=generator).tolist()
        parts = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        amounts = (options.brightness, options.contrast, options.saturation)
        factors = [_between(max(0, 1 - most), 1 + most, part) for most, part in zip(amounts, parts, strict=False)]
        changes = [
            (functional.adjust_brightness, factors[0]),
            (functional.adjust_contrast, factors[1]),
            (functional.adjust_saturation, factors[2]),
            (functional.adjust_hue, _between(-options.hue, options.hue, parts[3])),
        ]
        is_asked = [*amounts, options.hue]
        return [changes[place] for place in order if is_asked[place]]


def _between(low: float, high: float, part: float) -> float:
    return low + (high - low) * part


def as_torchvision_takes_it(image: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Changes an image whose floats are 0 to 255 by a function for which they are 0 to 1."""
    if not image.is_floating_point():
        return change(image)
    return change(image / _UP_TO_ONE) * _UP_TO_ONE


def _everywhere(sample: Mapping[str, Tensor], operation: Callable[..., Any], **arguments: Any) -> Sample:
    """Applies an operation to the image and to every label that is somewhere in it."""
    dense = [value for value in sample.values() if isinstance(value, Dense)]
    move = Move.of(operation, dense[0], **arguments) if dense and operation in MOVES else None
    moved: Sample = {}
    for name, value in sample.items():
        if isinstance(value, Dense) and move is not None:
            moved[name] = move(value)
        else:
            is_placed = name == IMAGE or isinstance(value, Dense | Points)
            moved[name] = operation(value, **arguments) if is_placed else value
    return moved


def build_built_in(config: BuiltInConfig, size: tuple[int, int], key: str) -> PipelineStep:
    """The transform that a configuration names.

    Args:
        config: The transform.
        size: Height and width of what the pipeline returns.
        key: The key of the transform, dotted.
    """
    if isinstance(config, CropConfig):
        return RandomResizedCrop(config, size)
    if isinstance(config, FlipConfig):
        return Flip(config)
    if isinstance(config, ScaleConfig):
        return RandomScale(config)
    if isinstance(config, RotationConfig):
        return RandomRotation(config)
    if isinstance(config, ColourConfig):
        return Colour(config, key)
    return Resize(size)
