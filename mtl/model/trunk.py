"""The trunk: a timm model, unchanged, and how its features are read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Features:
    """What the trunk gives to the heads.

    Attributes:
        pyramid: Maps from fine to coarse, each "b c h w"; empty if no head reads them.
        pooled: One vector an image, "b c"; None if no head reads it.
    """

    pyramid: list[Tensor]
    pooled: Tensor | None


@dataclass(frozen=True)
class FeatureShape:
    """Channels of `Features`: of each pyramid level from fine to coarse, and of the pooled vector."""

    pyramid: list[int]
    pooled: int


def pyramid_levels(trunk: nn.Module) -> list[int]:
    """Which of a timm model's intermediate features form the pyramid.

    For a model that halves its resolution step by step: the last feature of every stride from 4 on. For a plain one
    (ViT, MLP-Mixer), whose features all have one stride: four at even distances, the last included.
    """
    info: Any = trunk.feature_info
    strides = [entry["reduction"] for entry in (info if isinstance(info, list) else info.info)]
    last_of_stride = {stride: index for index, stride in enumerate(strides)}
    if len(last_of_stride) > 1:
        return sorted(index for stride, index in last_of_stride.items() if stride >= 4)
    count = len(strides)
    return sorted({max(0, round(count * quarter / 4) - 1) for quarter in (1, 2, 3, 4)})


def read_features(trunk: Any, images: Tensor, levels: list[int], pooled: bool) -> Features:
    """Runs a timm model and collects what the heads read.

    Args:
        trunk: A timm model made with `num_classes=0`.
        images: "b 3 h w", normalised.
        levels: Indices of the intermediate features to return; empty runs none of that code.
        pooled: Whether to return the pooled vector too; if not, the layers that only it needs are not run.
    """
    if not levels:
        return Features([], trunk.forward_head(trunk.forward_features(images), pre_logits=True))
    if not pooled:
        return Features(trunk.forward_intermediates(images, indices=levels, intermediates_only=True), None)
    final, maps = trunk.forward_intermediates(images, indices=levels)
    return Features(maps, trunk.forward_head(final, pre_logits=True))


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Puts a module in eval mode, and afterwards every part of it back in the mode it was in."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        # Some models keep a tensor of theirs, with its graph, from one pass in eval mode for the next (LeViT).
        module.train()
        for part, mode in modes.items():
            part.training = mode


def feature_shape(trunk: nn.Module, levels: list[int], image_size: int) -> FeatureShape:
    """Channels of the features, read off one forward of a blank image; the trunk is left as it was.

    Raises:
        ValueError: The trunk does not pool to one vector per image.
    """
    reference = next(trunk.parameters())
    blank = torch.zeros(1, 3, image_size, image_size, device=reference.device, dtype=reference.dtype)
    with in_eval_mode(trunk), torch.no_grad():
        features = read_features(trunk, blank, levels, pooled=True)
    if features.pooled is None or features.pooled.ndim != 2:
        raise ValueError("expected a pooled vector per image; a trunk without pooling has none")
    return FeatureShape([level.shape[1] for level in features.pyramid], features.pooled.shape[1])
