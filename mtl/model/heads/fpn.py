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

    Features are summed from coarse to fine; levels of equal resolution (a plain ViT's) are summed as they are. They are
    smoothed by two convolutions after the last sum, or by one after each, as in Lin et al.: two thirds of the
    arithmetic, since all but the last are on small maps. A separable one is a convolution of each channel and a linear
    map of them (Howard et al., arXiv 1704.04861), without an activation in between.
    """

    class Options(Strict):
        """Attributes:
        width: Channels of each level.
        smooth: Where 3 x 3 convolutions are: two on the `finest` level, or one on each of the `levels` but the
            coarsest.
        separable: Whether the last one is separable.
        """

        width: Count = 48
        smooth: Literal["finest", "levels"] = "finest"
        separable: bool = False

    output: ClassVar[Literal["dense", "vector"]] = "dense"
    reads: frozenset[Kind] = frozenset({"pyramid"})

    def __init__(
        self,
        shape: FeatureShape,
        num_outputs: int,
        width: int = 48,
        smooth: Literal["finest", "levels"] = "finest",
        separable: bool = False,
    ) -> None:
        """Raises:
        ValueError: There is one level only, and `smooth` asks for several.
        """
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in shape.pyramid)
        self._is_smooth_at_once = smooth == "finest"
        num_sums = len(shape.pyramid) - 1
        if self._is_smooth_at_once:
            self.smooth = nn.Sequential(*_smoothing(width), *_smoothing(width, separable))
        elif num_sums:
            which = [separable, *[False] * (num_sums - 1)]
            self.smooth = nn.Sequential(*(nn.Sequential(*_smoothing(width, each)) for each in which))
        else:
            raise ValueError("smooth: levels needs several, and this trunk has one; expected finest")
        self.out = nn.Conv2d(width, num_outputs, 1)
        start_near_zero(self.out)

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        levels = [lateral(level) for lateral, level in zip(self.lateral, features.pyramid, strict=True)]
        merged = levels[-1]
        for number, level in reversed([*enumerate(levels[:-1])]):
            merged = level + functional.interpolate(merged, size=level.shape[-2:], mode="nearest")
            if not self._is_smooth_at_once:
                merged = self.smooth[number](merged)
        if self._is_smooth_at_once:
            merged = self.smooth(merged)
        return enlarge(self.out(merged), size)


def _smoothing(width: int, separable: bool = False) -> list[nn.Module]:
    """A 3 x 3 convolution that keeps the width, with what follows it."""
    first = nn.Conv2d(width, width, 3, padding=1, groups=width if separable else 1, bias=False)
    convolutions = [first, nn.Conv2d(width, width, 1, bias=False)] if separable else [first]
    return [*convolutions, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
