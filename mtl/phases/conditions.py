"""The conditions that end a phase, a class each: read from a configuration, asked whether they hold, put in words.

No torch is imported: the scheduler, which asks, is a pure state machine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from mtl.runtime.best import Best, Direction
from mtl.runtime.text import count

if TYPE_CHECKING:
    from mtl.config.phase import UntilConfig
    from mtl.config.yaml_source import KeyPath
    from mtl.phases.metrics import RunMetrics

Unit = Literal["epochs", "steps", "seconds"]


@dataclass
class Observations:
    """Counts and metrics observed in a phase so far, as far as conditions need them.

    Attributes:
        epochs: Epochs done.
        steps: Steps done.
        seconds: Time spent.
        bests: The best value of each plateau's metric, and for how long there was no new one.
        latest: The latest value of each metric that has to reach a mark; None before the first, or if not finite.
    """

    epochs: int = 0
    steps: int = 0
    seconds: float = 0.0
    bests: dict[Plateau, Best] = field(default_factory=dict)
    latest: dict[str, float | None] = field(default_factory=dict)

    def epoch_done(self, metrics: Mapping[str, float]) -> None:
        self.epochs += 1
        for plateau, best in self.bests.items():
            best.update(metrics[plateau.metric])
        for metric in self.latest:
            self.latest[metric] = metrics[metric] if isfinite(metrics[metric]) else None


class Condition(ABC):
    """A condition that ends a phase; `str` puts it in words."""

    # Its keys under `until`.
    keys: ClassVar[tuple[str, ...]]

    @classmethod
    @abstractmethod
    def from_config(cls, until: UntilConfig, path: KeyPath, metrics: RunMetrics) -> Self:
        """Reads the condition; `build_condition` has found its class.

        Raises:
            ConfigError: There is no such metric, or it is not known which of its values are better.
        """

    @abstractmethod
    def reason(self, observed: Observations) -> str | None:
        """Why it holds, in words; None if it does not."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that it waits for."""
        return ()

    @abstractmethod
    def begin(self, observed: Observations) -> None:
        """Adds what is to be observed for it, as a phase begins."""


@dataclass(frozen=True)
class Plateau(Condition):
    """Holds while a metric has had no new best for some epochs.

    Attributes:
        metric: The metric.
        patience: For how many epochs in a row.
        direction: Which values are better.
        min_delta: By how much a value has to beat the best one; see `Best`.
    """

    keys = ("plateau",)

    metric: str
    patience: int = 1
    direction: Direction = "higher"
    min_delta: float = 0.0

    @classmethod
    def from_config(cls, until: UntilConfig, path: KeyPath, metrics: RunMetrics) -> Self:
        metric = str(until.plateau)
        direction = metrics.direction(metric, until.direction, path, "plateau")
        return cls(metric, until.patience or 1, direction, until.min_delta or 0.0)

    @property
    def metrics(self) -> tuple[str, ...]:
        return (self.metric,)

    def begin(self, observed: Observations) -> None:
        observed.bests[self] = Best(self.direction, self.min_delta)

    def reason(self, observed: Observations) -> str | None:
        num_since = observed.bests[self].num_since
        return self._in_words(num_since) if num_since >= self.patience else None

    def __str__(self) -> str:
        return self._in_words(self.patience)

    def _in_words(self, num_epochs: int) -> str:
        return f"plateau of {self.metric} for {num_epochs} epoch{'' if num_epochs == 1 else 's'}"


@dataclass(frozen=True)
class Reached(Condition):
    """Holds while the latest value of a metric is at its mark, or beyond it.

    Attributes:
        metric: The metric.
        mark: The value to reach.
        direction: `higher` if values from the mark up will do, `lower` if values from the mark down.
    """

    keys = ("metric",)

    metric: str
    mark: float
    direction: Direction = "higher"

    @classmethod
    def from_config(cls, until: UntilConfig, path: KeyPath, metrics: RunMetrics) -> Self:
        metric = str(until.metric)
        metrics.direction(metric, "higher", path)  # there has to be such a metric; which values will do is said
        if until.at_least is not None:
            return cls(metric, until.at_least, "higher")
        return cls(metric, until.at_most or 0.0, "lower")

    @property
    def metrics(self) -> tuple[str, ...]:
        return (self.metric,)

    def begin(self, observed: Observations) -> None:
        observed.latest[self.metric] = None

    def reason(self, observed: Observations) -> str | None:
        value, sign = observed.latest[self.metric], 1 if self.direction == "higher" else -1
        if value is None or sign * value < sign * self.mark:
            return None
        return f"{self.metric} reached {value:.4g} (mark {self.mark:g})"

    def __str__(self) -> str:
        return f"{self.metric} is at {'least' if self.direction == 'higher' else 'most'} {self.mark:g}"


@dataclass(frozen=True)
class Spent(Condition):
    """Holds once the phase has lasted for a number of epochs, steps or seconds."""

    keys = ("wall_time_s", "epochs", "steps")

    amount: float
    unit: Unit

    @classmethod
    def from_config(cls, until: UntilConfig, path: KeyPath, metrics: RunMetrics) -> Self:
        del path, metrics
        if until.wall_time_s is not None:
            return cls(until.wall_time_s, "seconds")
        return cls(until.steps or 0, "steps") if until.epochs is None else cls(until.epochs, "epochs")

    def begin(self, observed: Observations) -> None:
        """Nothing to add: these are always counted."""

    def reason(self, observed: Observations) -> str | None:
        done: float = getattr(observed, self.unit)
        return done_in_words(done, self.unit) if done >= self.amount else None

    def __str__(self) -> str:
        return count(self.amount, self.unit.removesuffix("s"))


@dataclass(frozen=True)
class _Group(Condition):
    conditions: tuple[Condition, ...]

    @classmethod
    def from_config(cls, until: UntilConfig, path: KeyPath, metrics: RunMetrics) -> Self:
        (key,) = cls.keys
        inner: list[UntilConfig] = getattr(until, key)
        return cls(tuple(build_condition(each, (*path, key, n), metrics) for n, each in enumerate(inner)))

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(metric for each in self.conditions for metric in each.metrics)

    def begin(self, observed: Observations) -> None:
        for each in self.conditions:
            each.begin(observed)


class AnyOf(_Group):
    """Holds while one of its conditions does."""

    keys = ("any",)

    def reason(self, observed: Observations) -> str | None:
        return next((reason for each in self.conditions if (reason := each.reason(observed))), None)

    def __str__(self) -> str:
        return f"({' or '.join(map(str, self.conditions))})"


class AllOf(_Group):
    """Holds while all of its conditions do."""

    keys = ("all",)

    def reason(self, observed: Observations) -> str | None:
        reasons = [each.reason(observed) for each in self.conditions]
        return None if None in reasons else " and ".join(filter(None, reasons))

    def __str__(self) -> str:
        return f"({' and '.join(map(str, self.conditions))})"


_KINDS: tuple[type[Condition], ...] = (Plateau, Reached, Spent, AnyOf, AllOf)


def build_condition(until: UntilConfig, path: KeyPath, metrics: RunMetrics) -> Condition:
    """A condition as it was written; the configuration is known to have exactly one of the keys.

    Args:
        until: What was written.
        path: Its key path.
        metrics: The metrics that it may name.

    Raises:
        ConfigError: As `Condition.from_config`.
    """
    kind = next(kind for kind in _KINDS if any(getattr(until, key) is not None for key in kind.keys))
    return kind.from_config(until, path, metrics)


def done_in_words(number: float, unit: Unit) -> str:
    """`4 epochs done`, `1 second spent`."""
    written = f"{number:.4g}" if unit == "seconds" and number < 1000 else f"{number:.0f}"
    what = unit.removesuffix("s") if number == 1 else unit
    return f"{written} {what} {'spent' if unit == 'seconds' else 'done'}"
