"""Random changes of training images: how each is seen in an epoch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor

from mtl.config import AugmentConfig, DataConfig
from mtl.data.transfer import to_device


@dataclass(frozen=True)
class Light:
    """A brightness and a contrast for each image of a split.

    Attributes:
        brightness: "n", what values are multiplied by.
        contrast: "n", what distances from the image's mean are multiplied by, before that.
    """

    brightness: Tensor
    contrast: Tensor

    def of(self, images: Tensor, indices: Tensor) -> Tensor:
        """Images in this light.

        Args:
            images: "b h w c", uint8, or float32 from 0 to 255.
            indices: "b", on the CPU: their indices in the split.

        Returns:
            "b h w c", in the type of the images.
        """
        brightness, contrast = (
            to_device(factors[indices].view(-1, 1, 1, 1), images.device) for factors in (self.brightness, self.contrast)
        )
        values = images.float()
        mean = values.mean(dim=(1, 2, 3), keepdim=True)
        changed = (((values - mean) * contrast + mean) * brightness).clamp(0, 255)
        return changed if images.is_floating_point() else changed.round().to(torch.uint8)


@dataclass(frozen=True)
class View:
    """One way to see every image of a split.

    Attributes:
        number: Which one; the same number is the same view, in any run with the same seed.
        seed: That of the run.
        light: What augmentation changes; None if it changes nothing.
        place: Which of several data sets the images are from.
    """

    number: int
    seed: int
    light: Light | None = None
    place: str = ""

    def seed_of(self, index: int) -> int:
        """The seed from which transforms of one image draw: a function of run, view and image, and of nothing else."""
        return xxhash.xxh3_64_intdigest(f"{self.seed} {self.number} {index}{self.place}".encode()) >> 1


def draw_view(config: DataConfig, seed: int, number: int, num_images: int) -> View | None:
    """The view of that number, which depends on nothing but the arguments; None if images are seen as they are."""
    if not config.has_views:
        return None
    return View(number, seed, None if config.augment is None else _light(config.augment, seed, number, num_images))


def _light(config: AugmentConfig, seed: int, number: int, num_images: int) -> Light:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + number) * 2 + 1)
    brightness, contrast = 2 * torch.rand(2, num_images, generator=generator) - 1
    return Light(1 + config.brightness * brightness, 1 + config.contrast * contrast)
