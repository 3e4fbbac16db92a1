"""The embedded garments: 10,000 Fashion-MNIST images, from which both built-in data sets are made."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

# Garments are bright on black; what is darker than this share of full brightness is transparent surround.
ALPHA = 0.12


@dataclass(frozen=True)
class Sprites:
    """Garments of one split.

    Attributes:
        images: "n 28 28", uint8, bright garment on black.
        labels: "n", uint8, 0 to 9: t-shirt, trouser, pullover, dress, coat, sandal, shirt, sneaker, bag, ankle boot.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]

    @cached_property
    def blank_rows(self) -> NDArray[np.int64]:
        """How many transparent rows lie under each garment, "n"."""
        opaque: NDArray[np.bool_] = np.any(self.images > ALPHA * 255, axis=2)
        rows: NDArray[np.int64] = np.argmax(opaque[:, ::-1], axis=1)
        return rows


def load_sprites(split: str) -> Sprites:
    """Loads the garments of a split; no image is in both.

    Args:
        split: `train` (8,000 images) or `val` (2,000 images, from the original test set).
    """
    prefix = {"train": "train", "val": "test"}[split]
    asset = files("mtl.data").joinpath("assets", "fashion-mnist-10k.npz")
    with asset.open("rb") as file, np.load(file) as arrays:
        return Sprites(images=arrays[f"{prefix}_images"], labels=arrays[f"{prefix}_labels"])
