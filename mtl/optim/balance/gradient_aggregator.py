"""Aggregators of TorchJD that need the tasks' whole gradients, not only their inner products.

Sources and formulas are in the docstrings of `torchjd.aggregation`. Imported where such a method is used only.
"""

from __future__ import annotations

from torch import Tensor
from torchjd.aggregation import Aggregator, GradDrop, TrimmedMean

from mtl.optim.balance.gradient_method import Combined, GradientMethod, TaskGradients
from mtl.optim.balance.subset import narrowed, plain_attributes

# By their name in a configuration: those that remember nothing from step to step.
AGGREGATORS: dict[str, type[Aggregator]] = {"graddrop": GradDrop, "trimmedmean": TrimmedMean}


class GradientAggregator(GradientMethod):
    """An aggregator of TorchJD as the training loop uses it."""

    weighs = False

    def __init__(self, aggregator: Aggregator) -> None:
        self._aggregator = aggregator

    @property
    def name(self) -> str:
        return type(self._aggregator).__name__

    def _combine(self, gradients: TaskGradients) -> Combined:
        self._move(gradients.rows)
        if gradients.subset is None:
            return Combined(gradient=self._aggregator(gradients.rows))
        with narrowed(self._aggregator, gradients.subset):
            return Combined(gradient=self._aggregator(gradients.rows))

    def _move(self, rows: Tensor) -> None:
        # TorchJD has options as plain attributes, which `.to(rows)` would not move.
        for part in self._aggregator.modules():
            for name, value in plain_attributes(part).items():
                if isinstance(value, Tensor):
                    setattr(part, name, value.to(rows))
