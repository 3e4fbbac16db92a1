"""`fpn`: a feature pyramid, for an output per pixel."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.nn import functional

from mtl.config.types import Count, Strict
from mtl.model.heads.base import Head, enlarge, start_near_zero
from mtl.model.trunk import Features, FeatureShape, Kind


class FpnHead(Head):
    """A feature pyramid (Lin et al., arXiv 1612.03144) narrowed to one width, then one output per pixel.

    Features are summed from coarse to fine; levels of equal resolution (a plain ViT's) are summed as they are.
    """

    class Options(Strict):
        """Attributes:
        width: Channels of each level.
        """

        width: Count = 48

    output: ClassVar[Literal["dense", "vector"]] = "dense"
    reads: frozenset[Kind] = frozenset({"pyramid"})

    def __init__(self, shape: FeatureShape, num_outputs: int, width: int = 48) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in shape.pyramid)
        self.smooth = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        self.out = nn.Conv2d(width, num_outputs, 1)
        start_near_zero(self.out)

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        levels = [lateral(level) for lateral, level in zip(self.lateral, features.pyramid, strict=True)]
        merged = levels[-1]
        for level in reversed(levels[:-1]):
            merged = level + functional.interpolate(merged, size=level.shape[-2:], mode="nearest")
        return enlarge(self.out(self.smooth(merged)), size)
