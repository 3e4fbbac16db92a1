"""`linear_bn`: BatchNorm and a linear map per position, for an output per pixel on a frozen ViT."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from mtl.config.types import Strict
from mtl.model.heads.base import Head, enlarge, resize, start_near_zero
from mtl.model.trunk import Features, FeatureShape, Kind

Levels = Literal["last", "all"]


class NormedLevels(nn.BatchNorm2d):
    """BatchNorm of the last level of a pyramid, or of all levels, concatenated at the size of the finest."""

    def __init__(self, shape: FeatureShape, levels: Levels) -> None:
        super().__init__(shape.pyramid[-1] if levels == "last" else sum(shape.pyramid))
        self.levels = levels

    def forward(self, pyramid: list[Tensor]) -> Tensor:  # type: ignore[override]  # several maps in place of one
        """Args:
            pyramid: From fine to coarse, each "b c h w".

        Returns:
            "b c h w".
        """
        if self.levels == "last":
            return super().forward(pyramid[-1])
        height, width = pyramid[0].shape[-2:]
        return super().forward(torch.cat([resize(level, (height, width)) for level in pyramid], dim=1))


class LinearBnHead(Head):
    """BatchNorm, then a 1x1 convolution: the probe for segmentation in DINOv2's code (Oquab et al., arXiv 2304.07193).

    With `levels: all` it reads all levels, concatenated. Unlike there, they have not passed the trunk's last norm.
    """

    class Options(Strict):
        """Attributes:
        levels: `last`, or `all` levels of the pyramid, concatenated.
        """

        levels: Levels = "last"

    output: ClassVar[Literal["dense", "vector"]] = "dense"
    reads: frozenset[Kind] = frozenset({"pyramid"})

    def __init__(self, shape: FeatureShape, num_outputs: int, levels: Levels = "last") -> None:
        super().__init__()
        self.norm = NormedLevels(shape, levels)
        self.out = nn.Conv2d(self.norm.num_features, num_outputs, 1)
        start_near_zero(self.out)

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        return enlarge(self.out(self.norm(features.pyramid)), size)
