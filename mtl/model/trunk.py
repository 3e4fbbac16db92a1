"""Features of a trunk, which is an unchanged timm model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

# One kind of feature.
Kind = Literal["pyramid", "pooled", "tokens"]


@dataclass(frozen=True)
class Features:
    """The output of the trunk, which the heads read.

    Attributes:
        pyramid: Maps from fine to coarse, each "b c h w"; empty if no head reads them.
        pooled: One vector per image, "b c"; None if no head reads it.
        tokens: The trunk's last tokens, "b n c", in its own order: in a ViT those of the image as a whole (class,
            registers), then one per patch, row by row; None if no head reads them.
    """

    pyramid: list[Tensor]
    pooled: Tensor | None
    tokens: Tensor | None = None

    @property
    def kinds(self) -> frozenset[Kind]:
        """Which features there are."""
        there = {"pyramid": bool(self.pyramid), "pooled": self.pooled is not None, "tokens": self.tokens is not None}
        return frozenset(kind for kind in _KINDS if there[kind])

    def tensors(self) -> list[Tensor]:
        """All of them: the pyramid, then the tokens, then the pooled vector."""
        return [*self.pyramid, *(each for each in (self.tokens, self.pooled) if each is not None)]

    def only(self, kinds: Collection[Kind]) -> Features:
        """The features of some kinds, without the others."""
        return Features(
            self.pyramid if "pyramid" in kinds else [],
            self.pooled if "pooled" in kinds else None,
            self.tokens if "tokens" in kinds else None,
        )


_KINDS: tuple[Kind, ...] = ("pyramid", "pooled", "tokens")


def features_from(tensors: Sequence[Tensor], kinds: Collection[Kind]) -> Features:
    """The reverse of `Features.tensors`, for features of these kinds."""
    left = list(tensors)
    pooled = left.pop() if "pooled" in kinds else None
    tokens = left.pop() if "tokens" in kinds else None
    return Features(left, pooled, tokens)


@dataclass(frozen=True)
class FeatureShape:
    """The features that a head can read of a trunk, and their widths.

    Attributes:
        pyramid: Channels of each level, from fine to coarse; empty if no head reads the pyramid.
        pooled: Channels of the pooled vector.
        tokens: Channels of the tokens; None if the trunk gives none.
        strides: Pixels of the image per element of each level. A plain model (ViT) has the same on all levels.
        sizes: Height and width of each level, for images of the run's size.
    """

    pyramid: list[int]
    pooled: int
    tokens: int | None = None
    strides: tuple[int, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether there are several levels of one resolution, as a plain ViT has them."""
        return len(self.strides) > 1 and len(set(self.strides)) == 1


def size_of(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width in pixels; a single number is both."""
    return (image_size, image_size) if isinstance(image_size, int) else image_size


def reductions(trunk: nn.Module) -> list[int]:
    """The stride of each of a timm model's intermediate features, in pixels."""
    info: Any = trunk.feature_info
    return [entry["reduction"] for entry in (info if isinstance(info, list) else info.info)]


def pyramid_levels(trunk: nn.Module) -> list[int]:
    """The indices of a timm model's intermediate features that form the pyramid.

    A model that halves its resolution several times: the last feature of every stride from 4 on. A plain model (ViT,
    MLP-Mixer), whose features all have one stride: four at even distances, the last included.
    """
    strides = reductions(trunk)
    last_of_stride = {stride: index for index, stride in enumerate(strides)}
    if len(last_of_stride) > 1:
        return sorted(index for stride, index in last_of_stride.items() if stride >= 4)
    count = len(strides)
    return sorted({max(0, round(count * quarter / 4) - 1) for quarter in (1, 2, 3, 4)})


def read_features(trunk: Any, images: Tensor, levels: list[int], pooled: bool, tokens: bool = False) -> Features:
    """Runs a timm model and collects the features that the heads read.

    Args:
        trunk: A timm model made with `num_classes=0`.
        images: "b 3 h w", normalised.
        levels: Indices of the intermediate features to return; if empty, none are collected.
        pooled: Whether to return the pooled vector too; if not, layers that only it needs are not run.
        tokens: Whether to return the last tokens too.
    """
    if levels and not pooled and not tokens:
        return Features(trunk.forward_intermediates(images, indices=levels, intermediates_only=True), None)
    if levels:
        final, maps = trunk.forward_intermediates(images, indices=levels)
    else:
        final, maps = trunk.forward_features(images), []
    vector = trunk.forward_head(final, pre_logits=True) if pooled else None
    return Features(maps, vector, final if tokens else None)


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Puts a module in eval mode, and restores the mode of each submodule afterwards."""
    modes = {part: part.training for part in module.modules()}
    _switch(module, modes, False)
    try:
        yield
    finally:
        # Some models (LeViT) cache a tensor, with its graph, in eval mode; their `train` clears it.
        _switch(module, modes, True)
        for part, mode in modes.items():
            part.training = mode


def _switch(module: nn.Module, modes: Mapping[nn.Module, bool], mode: bool) -> None:
    """As `module.train(mode)`, but for parts of a module in train mode that were not, such as its frozen trunk.

    Args:
        module: The module, or a part of it.
        modes: By part, whether it was in train mode.
        mode: Whether to switch to that.
    """
    if not modes.get(module) or type(module).train is not nn.Module.train:
        module.train(mode)
        return
    module.training = mode
    for child in module.children():
        if any(modes.get(part, True) for part in child.modules()):
            _switch(child, modes, mode)


def feature_shape(
    trunk: nn.Module, levels: list[int], image_size: int | tuple[int, int], channels: int = 3
) -> FeatureShape:
    """Channels of the features, from one forward of a blank image; the trunk is unchanged afterwards.

    Raises:
        ValueError: The trunk does not pool to one vector per image.
    """
    reference = next(trunk.parameters())
    size = size_of(image_size)
    blank = torch.zeros(1, channels, *size, device=reference.device, dtype=reference.dtype)
    with in_eval_mode(trunk), torch.no_grad():
        features = read_features(trunk, blank, levels, pooled=True, tokens=True)
    if features.pooled is None or features.pooled.ndim != 2:
        raise ValueError("expected a pooled vector per image, but this trunk has no pooling")
    # What goes into the pooling: tokens have three dimensions, maps have four.
    tokens = features.tokens if features.tokens is not None and features.tokens.ndim == 3 else None
    return FeatureShape(
        [level.shape[1] for level in features.pyramid],
        features.pooled.shape[1],
        None if tokens is None else tokens.shape[2],
        tuple(reductions(trunk)[level] for level in levels),
        tuple((level.shape[2], level.shape[3]) for level in features.pyramid),
    )
