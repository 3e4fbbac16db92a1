"""Heads: modules that map the trunk's features to one task's output."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from mtl.model.trunk import Features, FeatureShape


class DenseHead(nn.Module):
    """A feature pyramid (Lin et al., arXiv 1612.03144) narrowed to one width, then one output per pixel.

    Features are summed from coarse to fine; levels of equal resolution (a plain ViT's) are summed as they are.
    """

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
        nn.init.normal_(self.out.weight, std=0.01)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        """Args:
            features: The trunk's pyramid, fine to coarse, each "b c h w".
            size: Height and width of the output, in pixels.

        Returns:
            "b num_outputs h w".
        """
        levels = [lateral(level) for lateral, level in zip(self.lateral, features.pyramid, strict=True)]
        merged = levels[-1]
        for level in reversed(levels[:-1]):
            merged = level + functional.interpolate(merged, size=level.shape[-2:], mode="nearest")
        output: Tensor = self.out(self.smooth(merged))
        return enlarge(output, size)


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


class VectorHead(nn.Module):
    """A linear map of the trunk's pooled vector: one output per image."""

    def __init__(self, shape: FeatureShape, num_outputs: int) -> None:
        super().__init__()
        self.out = nn.Linear(shape.pooled, num_outputs)
        nn.init.normal_(self.out.weight, std=0.01)
        nn.init.zeros_(self.out.bias)

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:  # noqa: ARG002 - one signature for all
        """Args:
            features: The trunk's pooled vector, "b c".
            size: Unused: a vector has no resolution.

        Returns:
            "b num_outputs".
        """
        output: Tensor = self.out(features.pooled)
        return output


def build_head(kind: Literal["dense", "vector"], shape: FeatureShape, num_outputs: int) -> DenseHead | VectorHead:
    return DenseHead(shape, num_outputs) if kind == "dense" else VectorHead(shape, num_outputs)


def set_output_bias(head: nn.Module, constant: Tensor) -> None:
    """Sets the bias of a head's last layer, so that training starts from a constant prediction.

    Args:
        head: A head with a layer `out`.
        constant: "c", the constant output.
    """
    with torch.no_grad():
        head.get_parameter("out.bias").copy_(constant)
