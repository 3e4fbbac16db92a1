"""Random changes of training images that leave every label as it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtl.config import AugmentConfig
from mtl.data.transfer import to_device


@dataclass(frozen=True)
class View:
    """One way to see every image of a split: each with a brightness and a contrast of its own.

    Attributes:
        number: Which one; the same number is the same view, in any run with the same seed.
        brightness: "n", what values are multiplied by.
        contrast: "n", what distances from the image's mean are multiplied by, before that.
    """

    number: int
    brightness: Tensor
    contrast: Tensor

    def of(self, images: Tensor, indices: Tensor) -> Tensor:
        """Images as this view shows them.

        Args:
            images: "b h w c", uint8.
            indices: "b", on the CPU: their indices in the split.

        Returns:
            "b h w c", uint8.
        """
        brightness, contrast = (
            to_device(factors[indices].view(-1, 1, 1, 1), images.device) for factors in (self.brightness, self.contrast)
        )
        values = images.float()
        mean = values.mean(dim=(1, 2, 3), keepdim=True)
        changed = ((values - mean) * contrast + mean) * brightness
        return changed.round().clamp(0, 255).to(torch.uint8)


def draw_view(config: AugmentConfig, seed: int, number: int, num_images: int) -> View:
    """The view of that number, which depends on nothing but the arguments."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + number) * 2 + 1)
    brightness, contrast = 2 * torch.rand(2, num_images, generator=generator) - 1
    return View(number, 1 + config.brightness * brightness, 1 + config.contrast * contrast)
