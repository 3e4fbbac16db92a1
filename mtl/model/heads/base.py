"""The base of all heads: a module from the trunk's features to one task's output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from pydantic import BaseModel
from torch import Tensor, nn
from torch.nn import functional

from mtl.model.trunk import Features, Kind


class Head(nn.Module, ABC):
    """A head, constructed as `Name(shape=FeatureShape, num_outputs=int, **options)`.

    Its last layer is called `out` and has a bias "num_outputs", which is set to the task's best constant output before
    training; a head with another last layer overrides `set_output_bias`. Which features the trunk computes for it, and
    keeps where it is frozen, follows from `reads`.

    Attributes:
        Options: The model of its options, a subclass of `mtl.config.Strict`; without one, they are not checked before
            they are passed.
        output: `dense` for an output per pixel, `vector` for one per image; it has to be that of the task.
        reads: The kinds of features that it reads. A class gives all that it may read; `__init__` may narrow that down
            for a trunk.
        out: The last layer.
    """

    Options: ClassVar[type[BaseModel] | None] = None
    output: ClassVar[Literal["dense", "vector"]]
    reads: frozenset[Kind]
    out: nn.Module

    @abstractmethod
    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        """Args:
            features: At least those of the kinds that it reads.
            size: Height and width of the images, in pixels.

        Returns:
            "b num_outputs h w" of that size from a dense head, "b num_outputs" from a vector head.
        """

    def set_output_bias(self, constant: Tensor) -> None:
        """Has training start from a constant prediction, as nearly as random weights allow.

        Args:
            constant: "num_outputs", the task's best constant output.

        Raises:
            ValueError: The head cannot give this constant.
        """
        with torch.no_grad():
            self.get_parameter("out.bias").copy_(constant)


def start_near_zero(layer: nn.Conv2d | nn.Linear) -> None:
    """Initialises a last layer so that its output is small until it has learned something."""
    nn.init.normal_(layer.weight, std=0.01)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear interpolation of "b c h w"; the maps themselves if they have this size."""
    if tuple(maps.shape[-2:]) == size:
        return maps
    return functional.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def enlarge(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear interpolation, the same as `functional.interpolate(mode="bilinear")`.

    It is linear in rows and in columns: two products with small matrices. Forward and backward take a third of the time
    on a CPU.

    Args:
        maps: "b c h w", floats.
        size: Height and width of the result.
    """
    if torch.compiler.is_compiling():  # the compiler has its own kernel, and cannot use cached matrices
        return functional.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    rows, columns = (
        _weights(old, new, maps.device, maps.dtype) for old, new in zip(maps.shape[-2:], size, strict=True)
    )
    return rows @ maps.contiguous() @ columns.T


@lru_cache(maxsize=64)
def _weights(old: int, new: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The matrix "new old" that interpolates a line of pixels."""
    # Inference mode off: the cached matrix is used in training too.
    with torch.inference_mode(mode=False), torch.no_grad():
        every_pixel = torch.eye(old, device=device)[None]
        line = functional.interpolate(every_pixel, size=new, mode="linear", align_corners=False)
        return line[0].T.to(dtype).contiguous()
