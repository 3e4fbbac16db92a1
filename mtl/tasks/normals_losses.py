"""Unit normals: which are labelled, angles between them, and the losses of `normals`."""

from __future__ import annotations

import torch
from torch import Tensor

from mtl.tasks.loss import Loss


def labelled_normals(label: Tensor) -> Tensor:
    """Where vectors "b 3 h w" are finite and not 0, "b h w", bool."""
    # One pass over the vectors: a NaN is not above 0.
    size = label.abs().sum(dim=1)
    return (size > 0) & (size < torch.inf)


def directions(vectors: Tensor) -> Tensor:
    """Vectors "b 3 h w" scaled to length 1; zero vectors stay zero.

    The same as `functional.normalize`, whose norm over a dimension that is not the last one in memory takes 60 times as
    long on a CPU.
    """
    return vectors * vectors.square().sum(dim=1, keepdim=True).clamp_min(1e-24).rsqrt()


def angles(output: Tensor, label: Tensor) -> Tensor:
    """The angles between vectors "b 3 h w", of any length, in degrees: "b h w", float64; 180 where one is NaN."""
    a, b = directions(output.double()), directions(label.double().nan_to_num())
    # atan2 keeps its precision near 0 and 180 degrees, where acos loses half the digits.
    angle = 2 * torch.atan2((a - b).square().sum(1).sqrt(), (a + b).square().sum(1).sqrt()).rad2deg()
    return angle.nan_to_num(nan=180.0)  # a NaN output gets the largest error


class Chord(Loss):
    """The chord between unit vectors, 2 sin(angle / 2): close to the angle in radians, which the metrics use."""

    def __call__(self, output: Tensor, label: Tensor) -> Tensor:
        square = (output - label).square().sum(dim=1)
        return (square + 1e-6).sqrt()


class Cosine(Loss):
    """1 - cos(angle)."""

    def __call__(self, output: Tensor, label: Tensor) -> Tensor:
        return 1 - (output * label).sum(dim=1)


class L1OfNormals(Loss):
    """Mean absolute difference of the three components."""

    def __call__(self, output: Tensor, label: Tensor) -> Tensor:
        return (output - label).abs().mean(dim=1)
