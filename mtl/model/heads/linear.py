"""`linear`: a linear map of the pooled vector, for an output per image."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn

from mtl.config.types import Strict
from mtl.model.heads.base import Head, start_near_zero
from mtl.model.trunk import Features, FeatureShape, Kind


class LinearHead(Head):
    """A linear map of the trunk's pooled vector."""

    class Options(Strict):
        """It has none."""

    output: ClassVar[Literal["dense", "vector"]] = "vector"
    reads: frozenset[Kind] = frozenset({"pooled"})

    def __init__(self, shape: FeatureShape, num_outputs: int) -> None:
        super().__init__()
        self.out = nn.Linear(shape.pooled, num_outputs)
        start_near_zero(self.out)

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:  # noqa: ARG002 - one signature for all
        output: Tensor = self.out(features.pooled)
        return output
