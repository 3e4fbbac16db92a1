"""The sum of the losses' logarithms (`si`), which no scale of a loss changes."""

from __future__ import annotations

from torch import Tensor

from mtl.optim.balance.scalarizers import Scalarizer


class SumOfLogs(Scalarizer):
    """The scale-invariant baseline of Navon et al., "Multi-Task Learning as a Bargaining Game" (ICML 2022), section 5.

    A loss that is multiplied by a constant gives the same gradient. That is the direction of `geometricmean`, with
    another length. Losses have to be positive: of others the logarithm is not finite, and neither is the step.
    """

    def forward(self, values: Tensor, /) -> Tensor:
        return values.log().sum()
