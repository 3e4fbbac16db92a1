"""Features of a trunk, which is an unchanged timm model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Features:
    """The output of the trunk, which the heads read.

    Attributes:
        pyramid: Maps from fine to coarse, each "b c h w"; empty if no head reads them.
        pooled: One vector per image, "b c"; None if no head reads it.
    """

    pyramid: list[Tensor]
    pooled: Tensor | None


@dataclass(frozen=True)
class FeatureShape:
    """Channels of `Features`: of each pyramid level from fine to coarse, and of the pooled vector."""

    pyramid: list[int]
    pooled: int


def pyramid_levels(trunk: nn.Module) -> list[int]:
    """The indices of a timm model's intermediate features that form the pyramid.

    A model that halves its resolution several times: the last feature of every stride from 4 on. A plain model (ViT,
    MLP-Mixer), whose features all have one stride: four at even distances, the last included.
    """
    info: Any = trunk.feature_info
    strides = [entry["reduction"] for entry in (info if isinstance(info, list) else info.info)]
    last_of_stride = {stride: index for index, stride in enumerate(strides)}
    if len(last_of_stride) > 1:
        return sorted(index for stride, index in last_of_stride.items() if stride >= 4)
    count = len(strides)
    return sorted({max(0, round(count * quarter / 4) - 1) for quarter in (1, 2, 3, 4)})


def read_features(trunk: Any, images: Tensor, levels: list[int], pooled: bool) -> Features:
    """Runs a timm model and collects the features that the heads read.

    Args:
        trunk: A timm model made with `num_classes=0`.
        images: "b 3 h w", normalised.
        levels: Indices of the intermediate features to return; if empty, none are collected.
        pooled: Whether to return the pooled vector too; if not, layers that only it needs are not run.
    """
    if not levels:
        return Features([], trunk.forward_head(trunk.forward_features(images), pre_logits=True))
    if not pooled:
        return Features(trunk.forward_intermediates(images, indices=levels, intermediates_only=True), None)
    final, maps = trunk.forward_intermediates(images, indices=levels)
    return Features(maps, trunk.forward_head(final, pre_logits=True))


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Puts a module in eval mode, and restores the mode of each submodule afterwards."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        # Some models (LeViT) cache a tensor, with its graph, in eval mode; their `train` clears it.
        module.train()
        for part, mode in modes.items():
            part.training = mode


def feature_shape(trunk: nn.Module, levels: list[int], image_size: tuple[int, int], channels: int) -> FeatureShape:
    """Channels of the features, from one forward of a blank image; the trunk is unchanged afterwards.

    Raises:
        ValueError: The trunk does not pool to one vector per image.
    """
    reference = next(trunk.parameters())
    blank = torch.zeros(1, channels, *image_size, device=reference.device, dtype=reference.dtype)
    with in_eval_mode(trunk), torch.no_grad():
        features = read_features(trunk, blank, levels, pooled=True)
    if features.pooled is None or features.pooled.ndim != 2:
        raise ValueError("expected a pooled vector per image, but this trunk has no pooling")
    return FeatureShape([level.shape[1] for level in features.pyramid], features.pooled.shape[1])
