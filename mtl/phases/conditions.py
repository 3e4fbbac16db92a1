"""How long a phase lasts: a number of epochs or steps, or until a condition holds. Plain data, with no torch in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mtl.runtime.best import Direction

Unit = Literal["epochs", "steps", "seconds"]


@dataclass(frozen=True)
class Plateau:
    """Holds while a metric has had no new best for some epochs.

    Attributes:
        metric: The metric.
        patience: For how many epochs in a row.
        direction: Which values are better.
        min_delta: By how much a value has to beat the best one; see `Best`.
    """

    metric: str
    patience: int = 1
    direction: Direction = "higher"
    min_delta: float = 0.0


@dataclass(frozen=True)
class Reached:
    """Holds while the latest value of a metric is at its mark, or beyond it.

    Attributes:
        metric: The metric.
        mark: The value to reach.
        direction: `higher` if values from the mark up will do, `lower` if values from the mark down.
    """

    metric: str
    mark: float
    direction: Direction = "higher"


@dataclass(frozen=True)
class Spent:
    """Holds once the phase has lasted so many epochs, steps or seconds."""

    amount: float
    unit: Unit


@dataclass(frozen=True)
class AnyOf:
    """Holds while one of its conditions does."""

    conditions: tuple[Condition, ...]


@dataclass(frozen=True)
class AllOf:
    """Holds while all of its conditions do."""

    conditions: tuple[Condition, ...]


Condition = Plateau | Reached | Spent | AnyOf | AllOf


@dataclass(frozen=True)
class PhaseLength:
    """How long a phase lasts: exactly one of `epochs`, `steps`, `until` and `evaluate_only`.

    Attributes:
        name: The phase.
        epochs: So many completed passes over the training data.
        steps: So many optimizer steps.
        until: Until a condition holds, but no longer than `max_epochs` or `max_steps`, of which one has to be given.
        max_epochs: Limit in epochs.
        max_steps: Limit in steps.
        evaluate_only: No step is made; the phase ends with its first validation.
    """

    name: str
    epochs: int | None = None
    steps: int | None = None
    until: Condition | None = None
    max_epochs: int | None = None
    max_steps: int | None = None
    evaluate_only: bool = False

    def __post_init__(self) -> None:
        """Raises:
        ValueError: There is not exactly one length, it has no limit, or a count is below 1.
        """
        lengths = [self.epochs, self.steps, self.until, True if self.evaluate_only else None]
        if sum(length is not None for length in lengths) != 1:
            raise ValueError(f"phase {self.name!r}: expected exactly one of epochs, steps, until, evaluate_only")
        limits = [limit for limit in (self.max_epochs, self.max_steps) if limit is not None]
        if bool(limits) != (self.until is not None):
            raise ValueError(f"phase {self.name!r}: expected max_epochs or max_steps exactly if there is an until")
        counts = [*limits, *(n for n in (self.epochs, self.steps) if n is not None)]
        counts += [leaf.patience for leaf in leaves_of(self.until) if isinstance(leaf, Plateau)]
        if any(leaf.amount <= 0 for leaf in leaves_of(self.until) if isinstance(leaf, Spent)):
            raise ValueError(f"phase {self.name!r}: expected amounts above 0 in until")
        if any(count < 1 for count in counts) or any(not c.conditions for c in groups_of(self.until)):
            raise ValueError(f"phase {self.name!r}: expected counts of at least 1 and conditions in any and all")


def leaves_of(condition: Condition | None) -> Iterator[Plateau | Reached | Spent]:
    """The conditions that are no groups, in the order in which they stand."""
    if isinstance(condition, AnyOf | AllOf):
        for each in condition.conditions:
            yield from leaves_of(each)
    elif condition is not None:
        yield condition


def groups_of(condition: Condition | None) -> Iterator[AnyOf | AllOf]:
    if isinstance(condition, AnyOf | AllOf):
        yield condition
        for each in condition.conditions:
            yield from groups_of(each)
