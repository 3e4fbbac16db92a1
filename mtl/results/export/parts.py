"""The modules that are exported: the whole model, or the trunk and each head alone, from and to plain tensors."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from mtl.model import MultiTaskModel
from mtl.model.heads import Head
from mtl.model.trunk import Features, Kind, features_from

Input = Literal["uint8", "float"]


def exportable(network: MultiTaskModel, tasks: Sequence[str]) -> MultiTaskModel:
    """A copy with the heads of some tasks, in eval mode, contiguous, and without gradient checkpointing."""
    own = copy.deepcopy(network)
    own.heads = nn.ModuleDict({name: own.heads[name] for name in tasks})
    own.memory_format = torch.contiguous_format
    own.to(memory_format=torch.contiguous_format)
    trunk: Any = own.trunk
    # Some models have the method, and no checkpointing.
    with suppress(AttributeError, AssertionError, NotImplementedError):
        trunk.set_grad_checkpointing(False)
    return own.eval().requires_grad_(False)


class _FromImages(nn.Module):
    """The part of a model that reads images.

    Attributes:
        network: From `exportable`.
        input: `uint8` for images from 0 to 255, `float` for float32 from 0 to 1.
        step: Other sizes than its multiples are refused.
    """

    def __init__(self, network: MultiTaskModel, input: Input, step: int = 1) -> None:  # noqa: A002 - the option's name
        super().__init__()
        self.network, self.input, self.step = network, input, step

    def read(self, images: Tensor) -> Features:
        """The features that all heads read of images "b c h w"."""
        if self.step > 1:
            # A program does not check the sides that vary, but it cannot divide others into cells.
            cells = rearrange(images, "b c (h p) (w q) -> b c h p w q", p=self.step, q=self.step)
            images = rearrange(cells, "b c h p w q -> b c (h p) (w q)")
        stored = rearrange(images, "b c h w -> b h w c")
        return self.network.read(self.network.prepare(stored * 255 if self.input == "float" else stored))


class Whole(_FromImages):
    """From images "b c h w" to the raw outputs by task."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features, size = self.read(images), (images.shape[-2], images.shape[-1])
        return {name: head(features, size) for name, head in self.network.heads.items()}


class TrunkPart(_FromImages):
    """From images "b c h w" to the features that the heads read, by name."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.read(images)
        return dict(zip(feature_names(features), features.tensors(), strict=True))


class HeadPart(nn.Module):
    """From features to the output of one task.

    Attributes:
        head: The head.
        size: Height and width of the images, in pixels; where the features vary in size, that of the finest map.
        stride: Pixels of the image to an element of the finest map; None if `size` is fixed.
    """

    def __init__(self, head: Head, size: tuple[int, int], stride: tuple[int, int] | None) -> None:
        super().__init__()
        self.head, self.size, self.stride = head, size, stride

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        read = features_from(list(features.values()), _kinds(features))
        size = self.size
        if self.stride is not None:
            rows, columns = read.pyramid[0].shape[-2:]
            size = (rows * self.stride[0], columns * self.stride[1])
        output: Tensor = self.head(read, size)
        return output


def feature_names(features: Features) -> list[str]:
    """The names of `features.tensors()`: `pyramid_0` is the finest map."""
    others = [name for name in ("tokens", "pooled") if getattr(features, name) is not None]
    return [*(f"pyramid_{level}" for level in range(len(features.pyramid))), *others]


def read_by(head: Head, features: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of the trunk's features that a head reads."""
    return {name: each for name, each in features.items() if _kind(name) in head.reads}


def _kind(name: str) -> Kind:
    return "pyramid" if name.startswith("pyramid") else "tokens" if name == "tokens" else "pooled"


def _kinds(features: dict[str, Tensor]) -> list[Kind]:
    return [_kind(name) for name in features]
