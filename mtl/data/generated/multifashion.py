"""`multifashion`: two overlapping garments on one canvas, each to be recognised.

After MultiMNIST (Sabour et al., arXiv 1710.09829) in the form that Sener and Koltun use for multi-task learning (arXiv
1810.04650): one garment at the top left, one at the bottom right, the brighter pixel wins where they overlap; the tasks
`left` and `right` are their classes. Here the canvas is 36 x 36 pixels before scaling.
"""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch.nn import functional

from mtl.data.generated.sprites import Sprites
from mtl.data.room import Stored

CANVAS = 36
BLOCK = 1000


def stored(num: int, size: int) -> Stored:
    """What is stored of some pairs: see `render_block`."""
    return {"images": ((num, size, size, 1), 1), "left": ((num,), 8), "right": ((num,), 8)}


def render_block(sprites: Sprites, size: int, seed: int, block: int) -> dict[str, NDArray[np.generic]]:
    """Composes one block of `BLOCK` pairs.

    Args:
        sprites: The garments, of one split.
        size: Height and width of the images, to which the canvas is scaled.
        seed: Seed of the whole split; the same seed and block give the same bytes.
        block: Which block of the split.

    Returns:
        images: "b h w 1", uint8.
        left: "b", int64, class of the garment at the top left.
        right: "b", int64, class of the garment at the bottom right.
    """
    rng = np.random.default_rng([seed, block])
    left, right = rng.integers(0, len(sprites.labels), (2, BLOCK))
    canvas = np.zeros((BLOCK, CANVAS, CANVAS), np.uint8)
    canvas[:, :28, :28] = sprites.images[left]
    canvas[:, -28:, -28:] = np.maximum(canvas[:, -28:, -28:], sprites.images[right])
    if size != CANVAS:
        scaled = functional.interpolate(
            torch.from_numpy(canvas)[:, None].float(), size=(size, size), mode="bilinear", antialias=True
        )
        canvas = scaled.round().clamp(0, 255).to(torch.uint8)[:, 0].numpy()
    return {
        "images": rearrange(canvas, "b h w -> b h w 1"),
        "left": sprites.labels[left].astype(np.int64),
        "right": sprites.labels[right].astype(np.int64),
    }
