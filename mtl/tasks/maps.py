"""Outputs for each pixel, brought to another size."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# Maps that are resized together: those of many classes at the size of a photograph do not fit into memory.
_AT_ONCE = 16


def resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps in another size, bilinear; where they get smaller, averaged.

    Args:
        maps: "b c h w", floats.
        size: Height and width in pixels.

    Returns:
        "b c height width"; the maps themselves if that is their size.
    """
    if tuple(maps.shape[-2:]) == size:
        return maps
    shrinks = size[0] < maps.shape[-2] or size[1] < maps.shape[-1]
    return functional.interpolate(maps, size, mode="bilinear", antialias=shrinks)


def highest(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Which of the maps is the highest at each pixel, of equal ones the first.

    Args: as for `resized`.

    Returns:
        "b height width", int64.
    """
    best, found = resized(maps[:, :_AT_ONCE], size).max(dim=1)
    for first in range(_AT_ONCE, maps.shape[1], _AT_ONCE):
        value, place = resized(maps[:, first : first + _AT_ONCE], size).max(dim=1)
        is_higher = value > best
        best, found = torch.where(is_higher, value, best), torch.where(is_higher, place + first, found)
    return found
