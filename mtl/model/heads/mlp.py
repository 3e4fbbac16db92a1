"""`mlp`: one hidden layer on the pooled vector, for an output per image."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from mtl.config.types import Count, Strict
from mtl.model.heads.base import Head, start_near_zero
from mtl.model.trunk import Features, FeatureShape, Kind


class MlpHead(Head):
    """The trunk's pooled vector through one hidden layer with GELU."""

    class Options(Strict):
        """Attributes:
        hidden: Units of the hidden layer.
        dropout: The share of them that is left out in training.
        """

        hidden: Count = 256
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    output: ClassVar[Literal["dense", "vector"]] = "vector"
    reads: frozenset[Kind] = frozenset({"pooled"})

    def __init__(self, shape: FeatureShape, num_outputs: int, hidden: int = 256, dropout: float = 0.0) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(shape.pooled, hidden), nn.GELU(), nn.Dropout(dropout))
        self.out = nn.Linear(hidden, num_outputs)
        start_near_zero(self.out)

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:  # noqa: ARG002 - one signature for all
        output: Tensor = self.out(self.hidden(features.pooled))
        return output
