"""`bins`: the expectation over bins of depth, for one number per pixel."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from mtl.config.types import Positive, Strict
from mtl.model.heads.base import Head, enlarge, start_near_zero
from mtl.model.heads.linear_bn import Levels, NormedLevels
from mtl.model.trunk import Features, FeatureShape, Kind

Space = Literal["log", "linear"]


class BinsHead(Head):
    """BatchNorm, a 1x1 convolution to a score per bin, and the expectation of the bins' centres under their softmax.

    AdaBins (Bhat et al., arXiv 2011.14141) with bins that are the same for all images, as in the depth probe of
    DINOv2's code (arXiv 2304.07193). That one has no BatchNorm, and divides relu(score) + 0.1 by its sum in place of
    the softmax. The centres are at even distances in the space of the task's output, log metres or metres.
    """

    class Options(Strict):
        """Attributes:
        num_bins: Number of bins.
        min: The first centre, in metres.
        max: The last centre, in metres.
        space: That of the task's output: `log` metres or `linear` metres.
        levels: As for `linear_bn`.
        """

        num_bins: Annotated[int, Field(ge=2, le=2**16)] = 256
        min: Positive = 0.1
        max: Positive = 10.0
        space: Space = "log"
        levels: Levels = "last"

        @model_validator(mode="after")
        def _are_in_order(self) -> BinsHead.Options:
            if self.min >= self.max:
                raise PydanticCustomError("bins", "Input should have a min below its max")
            return self

    output: ClassVar[Literal["dense", "vector"]] = "dense"
    reads: frozenset[Kind] = frozenset({"pyramid"})

    def __init__(
        self,
        shape: FeatureShape,
        num_outputs: int,
        num_bins: int = 256,
        min: float = 0.1,  # noqa: A002 - the key that a user writes
        max: float = 10.0,  # noqa: A002
        space: Space = "log",
        levels: Levels = "last",
    ) -> None:
        """Raises:
        ValueError: The task has more than one output.
        """
        super().__init__()
        if num_outputs != 1:
            raise ValueError(f"expected a task with one output, depth, got {num_outputs}")
        low, high = (math.log(min), math.log(max)) if space == "log" else (min, max)
        self.norm = NormedLevels(shape, levels)
        self.out = nn.Conv2d(self.norm.num_features, num_bins, 1)
        start_near_zero(self.out)
        self.register_buffer("centres", torch.linspace(low, high, num_bins), persistent=False)
        self.centres: Tensor

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        scores: Tensor = self.out(self.norm(features.pyramid))
        # In half precision, the sum over many bins would lose the difference between neighbouring depths.
        shares = scores.to(self.centres.dtype).softmax(dim=1)
        return enlarge((shares * self.centres.view(1, -1, 1, 1)).sum(dim=1, keepdim=True), size)

    def set_output_bias(self, constant: Tensor) -> None:
        """Sets the scores whose softmax has this expectation: a linear function of the centres, which of all such
        distributions gives the one of highest entropy (Jaynes 1957). The slope is found by bisection.

        Args:
            constant: "1", in the space of the output.

        Raises:
            ValueError: It is not between the first and the last centre.
        """
        centres, wanted = self.centres.double(), float(constant)
        first, last = float(centres[0]), float(centres[-1])
        if not first < wanted < last:
            raise ValueError(
                f"bins from {first:.4g} to {last:.4g} cannot give the task's best constant output, {wanted:.4g};"
                " set min, max and space (log or linear metres) to those of the task"
            )
        unit = (centres - first) / (last - first)
        # The expectation grows with the slope; at these ends it is within 1e-3 bins of the first and the last centre.
        low, high = -1e3 * len(unit), 1e3 * len(unit)
        for _ in range(100):
            slope = (low + high) / 2
            if float(((unit * slope).softmax(dim=0) * centres).sum()) < wanted:
                low = slope
            else:
                high = slope
        scores = unit * low
        with torch.no_grad():
            self.get_parameter("out.bias").copy_(scores - scores.logsumexp(dim=0))
