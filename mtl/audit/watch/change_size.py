"""The size of a change between two tensors of the same shape and dtype."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChangeSize:
    """The size of a change.

    Attributes:
        max_abs: The largest absolute difference of two elements; NaN if one of them is NaN.
        share: The share of elements whose bits differ, 0 to 1.
    """

    max_abs: float
    share: float


def size_of_change(before: Tensor, after: Tensor) -> ChangeSize:
    """Measures a change by bits: NaN equals NaN of the same bits, and -0.0 differs from 0.0.

    Args:
        before: A tensor.
        after: Another one of the same shape and dtype, on the same device.
    """
    if not before.numel():
        return ChangeSize(0.0, 0.0)
    differ = (bits_of(before) != bits_of(after)).view(before.numel(), -1).any(dim=1)
    if not bool(differ.any()):
        return ChangeSize(0.0, 0.0)
    wide = torch.complex128 if before.is_complex() else torch.float64
    delta = (after.reshape(-1)[differ].to(wide) - before.reshape(-1)[differ].to(wide)).abs()
    max_abs = math.nan if bool(delta.isnan().any()) else delta.max().item()
    return ChangeSize(max_abs, differ.double().mean().item())


def bits_of(tensor: Tensor) -> Tensor:
    """The bits of each element as an integer, "n"; two integers for an element wider than 8 bytes."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(tensor.element_size(), torch.int64)
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(integer)
