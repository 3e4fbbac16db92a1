"""Points of an image as torchvision's v2 transforms take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional
from torchvision.transforms.v2.functional import register_kernel

from mtl.data.transforms.dense import NoFormulaError


class Points(tv_tensors.KeyPoints):  # type: ignore[misc]  # torchvision has no types
    """Column and row of points, "k 2", in pixels from the image's corner: the centre of its first pixel is at 0.5.

    A point that leaves the image is invisible from then on.

    Attributes:
        visible: "k", the third number of the label; 0 where the point is not seen.
    """

    visible: Tensor

    @classmethod
    def of(cls, label: Tensor, size: tuple[int, int]) -> Points:
        """Points "k 3" of an image of that height and width."""
        points = label[:, :2].as_subclass(cls)
        points.canvas_size = size
        points.visible = torch.where(_is_inside(label[:, :2], size), label[:, 2], 0)
        return points

    @classmethod
    def wrap(cls, tensor: Tensor, like: Any, **kwargs: Any) -> Points:
        size = kwargs.get("canvas_size", like.canvas_size)
        places = tensor.as_subclass(Tensor)
        return cls.of(torch.cat([places, like.visible[:, None].to(places.dtype)], dim=1), size)

    def label(self) -> Tensor:
        """Column, row and visibility, "k 3"."""
        return torch.cat([self.as_subclass(Tensor), self.visible[:, None]], dim=1)

    def swapped(self, pairs: Sequence[Sequence[int]]) -> Points:
        """The same points, the two of each pair in each other's place.

        Raises:
            NoFormulaError: A pair names a point that is not there.
        """
        order = list(range(len(self)))
        if pairs and (last := max(map(max, pairs))) >= len(order):
            raise NoFormulaError(f"pairs: expected points 0 to {len(order) - 1}, got {last}")
        for first, second in pairs:
            order[first], order[second] = order[second], order[first]
        return self.of(self.label()[order], self.canvas_size)


def _is_inside(points: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = size
    x, y = points[:, 0], points[:, 1]
    return (x >= 0) & (x < width) & (y >= 0) & (y < height)


# In a flip, torchvision has the centres of pixels at whole numbers; in all else at halves, as we have.
def _flip_across(points: Points) -> Points:
    x, y = points.as_subclass(Tensor).unbind(1)
    return Points.wrap(torch.stack([points.canvas_size[1] - x, y], dim=1), points)


def _flip_down(points: Points) -> Points:
    x, y = points.as_subclass(Tensor).unbind(1)
    return Points.wrap(torch.stack([x, points.canvas_size[0] - y], dim=1), points)


def _register_refusal(operation: Any) -> None:
    def refuse(*_: Any, **__: Any) -> Points:
        raise NoFormulaError(f"there is no formula for points after `{operation.__name__}`")

    register_kernel(operation, Points)(refuse)


register_kernel(functional.horizontal_flip, Points)(_flip_across)
register_kernel(functional.vertical_flip, Points)(_flip_down)
for _operation in (functional.elastic, functional.perspective, functional.five_crop, functional.ten_crop):
    _register_refusal(_operation)
