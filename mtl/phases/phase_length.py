"""How long a phase lasts: a number of epochs or steps, or until a condition holds. No torch is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mtl.phases.conditions import Condition, Observations, Unit, build_condition, done_in_words
from mtl.runtime.text import count

if TYPE_CHECKING:
    from mtl.config.phase import WrittenPhase
    from mtl.phases.metrics import RunMetrics


@dataclass(frozen=True)
class PhaseLength:
    """How long a phase lasts: exactly one of `epochs`, `steps`, `until` and `evaluate_only`, as `PhaseConfig` checks.

    Attributes:
        name: The phase.
        epochs: Completed passes over the training data.
        steps: Optimizer steps.
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

    @classmethod
    def from_config(cls, written: WrittenPhase, metrics: RunMetrics) -> PhaseLength:
        """A phase's length.

        Raises:
            ConfigError: A condition names a metric that there is not, or does not say which of its values are better.
        """
        phase = written.config
        until = None if phase.until is None else build_condition(phase.until, (*written.path, "until"), metrics)
        return cls(
            written.name, phase.epochs, phase.steps, until, phase.max_epochs, phase.max_steps, phase.evaluate_only
        )

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that its end depends on."""
        return () if self.until is None else self.until.metrics

    def begin(self) -> Observations:
        """The observations of the phase, with nothing observed yet."""
        observed = Observations()
        if self.until is not None:
            self.until.begin(observed)
        return observed

    def reason(self, observed: Observations) -> str | None:
        """Why the phase is over, in words; None if it is not. A condition goes before a limit that is met with it."""
        if self.evaluate_only:
            return "evaluated" if observed.epochs else None
        if self.until is not None and (reason := self.until.reason(observed)):
            return reason
        units: list[tuple[Unit, int, int | None, int | None]] = [
            ("epochs", observed.epochs, self.epochs, self.max_epochs),
            ("steps", observed.steps, self.steps, self.max_steps),
        ]
        for unit, done, length, limit in units:
            if length is not None and done >= length:
                return done_in_words(done, unit)
            if limit is not None and done >= limit:
                return f"{done_in_words(done, unit)}, the limit"
        return None

    def num_steps(self, steps_per_epoch: int) -> int:
        """Its length in optimizer steps, at most."""
        lengths = [self.steps, self.max_steps]
        lengths += [n and n * steps_per_epoch for n in (self.epochs, self.max_epochs)]
        return min((n for n in lengths if n is not None), default=0)

    def describe(self, num_steps: int) -> str:
        """The length as it was written, and in steps: `2 epochs (10 steps)`.

        Args:
            num_steps: Its length in optimizer steps, at most.
        """
        if self.evaluate_only:
            return "one evaluation"
        if self.epochs is not None:
            return f"{count(self.epochs, 'epoch')} ({num_steps} steps)"
        if self.steps is not None:
            return count(self.steps, "step")
        limits = [count(n, unit) for n, unit in ((self.max_epochs, "epoch"), (self.max_steps, "step")) if n]
        steps = f" ({num_steps} steps)" if self.max_epochs is not None else ""
        return f"until {self.until}, at most {' or '.join(limits)}{steps}"
