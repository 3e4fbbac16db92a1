"""The masks of COCO's annotations: polygons and run lengths as arrays (github.com/cocodataset/cocoapi, maskApi.c)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]


def polygon_mask(polygon: NDArray[np.float32], size: tuple[int, int]) -> Mask:
    """The pixels whose centres are in a polygon, by the even-odd rule.

    A centre is at a half, 0.5 in the first pixel; on an edge, it is inside to the right of it and below it. COCO's own
    code draws the outline into a mask of five times the size instead, so that pixels of the edge may differ.

    Args:
        polygon: "p 2", column and row of each corner; (0, 0) is the image's corner.
        size: Height and width in pixels.
    """
    height, width = size
    # Each crossing of an edge with the middle of a row changes the pixels from there on.
    changes = np.zeros((height, width + 1), np.int32)
    start, end = polygon.astype(np.float64), np.roll(polygon, -1, axis=0).astype(np.float64)
    for (x0, y0), (x1, y1) in zip(start, end, strict=True):
        low, high = (y0, y1) if y0 < y1 else (y1, y0)
        rows = np.arange(max(0, np.ceil(low - 0.5)), min(height, np.ceil(high - 0.5)), dtype=np.int64)
        if len(rows):
            crossing = x0 + (rows + 0.5 - y0) * (x1 - x0) / (y1 - y0)
            columns = np.clip(np.ceil(crossing - 0.5), 0, width).astype(np.int64)
            changes[rows, columns] += 1
    return (np.cumsum(changes[:, :-1], axis=1) % 2).astype(np.bool_)


def run_length_mask(counts: Sequence[int], size: tuple[int, int]) -> Mask:
    """A mask from the lengths of its runs of 0 and 1 in turn, column by column, 0 first.

    Args:
        counts: The lengths.
        size: Height and width in pixels.

    Raises:
        ValueError: They do not add up to the number of pixels, or one is negative.
    """
    height, width = size
    if min(counts, default=0) < 0 or sum(counts) != height * width:
        raise ValueError(f"expected run lengths that add up to {height} x {width} pixels, got {sum(counts)}")
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(width, height).T


def decode_counts(text: str) -> list[int]:
    """Run lengths from COCO's compressed form.

    Each number is a row of characters with five bits each, the lowest first, plus 48; 32 marks that more follow, and
    the highest bit of the last one is the sign. From the fourth on, it is the difference to the number two before.

    Raises:
        ValueError: The text is no such form.
    """
    counts: list[int] = []
    number = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"expected run lengths in COCO's compressed form, got the character {character!r}")
        number |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            number -= 1 << shift
        counts.append(number + counts[-2] if len(counts) > 2 else number)
        number = shift = 0
    if shift:
        raise ValueError("expected run lengths in COCO's compressed form, got the beginning of one")
    return counts
