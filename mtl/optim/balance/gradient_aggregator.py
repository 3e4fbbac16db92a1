"""Aggregators of TorchJD that need the tasks' whole gradients, not only their inner products; found by name.

Sources and formulas are in the docstrings of `torchjd.aggregation`. Imported where such a method is used only.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchjd import aggregation
from torchjd.aggregation import Aggregator

from mtl.config import SettingError
from mtl.optim.balance.gradient_weights import OPTION_ERRORS, options_of, with_tensors
from mtl.optim.balance.state import check_same_method
from mtl.optim.balance.subset import Subset, narrowed, plain_attributes

# Those that remember nothing from step to step.
_NAMES = ("ConFIG", "GradDrop", "TrimmedMean")


def aggregator_methods() -> dict[str, str]:
    """The aggregators, by their name in a configuration: `config` -> `ConFIG`."""
    return {name.lower(): name for name in _NAMES}


def build_aggregator(method: str, options: Mapping[str, Any], num_tasks: int) -> GradientAggregator:
    """Makes an aggregator.

    Args:
        method: One of `aggregator_methods`.
        options: The aggregator's own.
        num_tasks: The number of tasks.

    Raises:
        SettingError: An option is unknown, missing, or does not fit the number of tasks.
    """
    kind: type[Aggregator] = getattr(aggregation, aggregator_methods()[method])
    takes = [name for name in options_of(kind) if name != "f"]  # a function, which a configuration cannot give
    try:
        if unknown := options.keys() - set(takes):
            raise TypeError(f"got {', '.join(sorted(unknown))}")
        aggregator = kind(**with_tensors(options))
        if num_tasks > 1:
            with torch.random.fork_rng([]), torch.device("cpu"):
                copy.deepcopy(aggregator)(torch.eye(num_tasks))
    except OPTION_ERRORS as error:
        known = ", ".join(takes) or "none"
        raise SettingError("balance.options", f"{method} takes the options {known}: {error}") from error
    return GradientAggregator(aggregator)


class GradientAggregator:
    """An aggregator of TorchJD as the training loop uses it."""

    def __init__(self, aggregator: Aggregator) -> None:
        self._aggregator = aggregator

    def combine(self, rows: Tensor, subset: Subset | None = None) -> Tensor:
        """The gradient of the shared parameters.

        Args:
            rows: "t p", the tasks' gradients.
            subset: The tasks whose gradients they are, if not all have labels.

        Returns:
            "p". A task without a gradient leaves the step, as if the method had fewer tasks; of fewer than two it is
            the sum. NaN if a gradient is not finite.

        Raises:
            SettingError: The method cannot combine so few tasks.
        """
        largest = rows.abs().amax(dim=1).tolist()
        if not all(value < torch.inf for value in largest):
            return torch.full_like(rows[0], torch.nan)
        here = [place for place, value in enumerate(largest) if value > 0]
        if len(here) < 2:
            return rows.sum(dim=0)
        self._move(rows)
        if subset is None and len(here) == len(rows):
            combined: Tensor = self._aggregator(rows)
            return combined
        known = Subset(tuple(range(len(rows))), len(rows)) if subset is None else subset
        left = Subset(tuple(known.places[place] for place in here), known.size)
        try:
            with narrowed(self._aggregator, left):
                combined = self._aggregator(rows[here])
        except OPTION_ERRORS as error:
            name, few = type(self._aggregator).__name__, f"the {len(here)} of {left.size} tasks"
            message = f"{name} cannot combine {few} that have a gradient in a step: {error}"
            raise SettingError("balance.method", message) from error
        return combined

    def _move(self, rows: Tensor) -> None:
        # TorchJD has options as plain attributes, which `.to(rows)` would not move.
        for part in self._aggregator.modules():
            for name, value in plain_attributes(part).items():
                if isinstance(value, Tensor):
                    setattr(part, name, value.to(rows))

    def state(self) -> dict[str, Any]:
        """Nothing: it remembers no step."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Raises:
        ValueError: It is the state of another method.
        """
        check_same_method(self.state(), state)
