"""The best value of a metric so far, and how long ago it came."""

from __future__ import annotations

import math
from typing import Literal, TypedDict

Direction = Literal["higher", "lower"]


class BestState(TypedDict):
    """A `Best` as plain data."""

    value: float | None
    num_since: int


class Best:
    """Follows one metric.

    A value is a new best if it beats the one before by more than `min_delta`; an equal one is not. A value that is not
    finite is never the best.

    Attributes:
        value: The best value; None before there is one.
        num_since: How many values have come since then; all of them if there is none.
    """

    def __init__(self, direction: Direction = "higher", min_delta: float = 0.0) -> None:
        """Args:
        direction: Which values are better.
        min_delta: By how much a value has to beat the best one.
        """
        self.value: float | None = None
        self.num_since = 0
        self._sign = 1.0 if direction == "higher" else -1.0
        self._min_delta = min_delta

    def update(self, value: float) -> bool:
        """Records the next value; returns whether it is a new best."""
        is_new = math.isfinite(value) and (
            self.value is None or self._sign * value > self._sign * self.value + self._min_delta
        )
        if is_new:
            self.value = value
        self.num_since = 0 if is_new else self.num_since + 1
        return is_new

    def state_dict(self) -> BestState:
        return BestState(value=self.value, num_since=self.num_since)

    def load_state_dict(self, state: BestState) -> None:
        """Continues from the state of another one with the same direction and margin."""
        self.value, self.num_since = state["value"], state["num_since"]
