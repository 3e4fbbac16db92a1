"""The task scheduler: which phase is active, and why it changed. A pure state machine, with no torch in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from mtl.phases.conditions import AllOf, AnyOf, Condition, PhaseLength, Plateau, Reached, Spent, leaves_of
from mtl.runtime.best import Best, BestState


@dataclass(frozen=True)
class PhaseChange:
    """The end of a phase.

    Attributes:
        ended: The phase that ended.
        entered: The phase that follows; None if the run is over.
        reason: Why, in words: `4 epochs done`, `plateau of val/score for 2 epochs`.
    """

    ended: str
    entered: str | None
    reason: str


class SchedulerState(TypedDict):
    """The scheduler's whole state, as plain data.

    Attributes:
        index: The active phase's place; the number of phases once the run is over.
        epochs: Epochs done in the phase.
        steps: Steps done in the phase.
        seconds: Time spent in the phase.
        plateaus: What the phase's plateaus remember, in the order in which they stand.
        latest: The latest values of the metrics that have to reach a mark; None if there is none, or it is not finite.
    """

    index: int
    epochs: int
    steps: int
    seconds: float
    plateaus: list[BestState]
    latest: dict[str, float | None]


class TaskScheduler:
    """Goes through phases as events are reported.

    The caller reports, in the order in which they happen, every optimizer step, every completed pass over the training
    data with its metrics, and the time that passes. A phase ends with the report that fills its length; the next one
    starts counting at 0, with no memory of metrics.
    """

    def __init__(self, phases: Sequence[PhaseLength]) -> None:
        """Raises:
        ValueError: There is no phase.
        """
        if not phases:
            raise ValueError("expected at least one phase")
        self._phases = list(phases)
        self._enter(0)

    @property
    def index(self) -> int | None:
        """The active phase's place in the list; None once the run is over."""
        return self._index if self._index < len(self._phases) else None

    def step_done(self) -> PhaseChange | None:
        """Reports one optimizer step.

        Returns:
            The change, if the step ended the phase.

        Raises:
            RuntimeError: The run is over, or the phase only evaluates.
        """
        if self._active().evaluate_only:
            raise RuntimeError(f"phase {self._active().name!r} only evaluates: it has no steps")
        self._steps += 1
        return self._look()

    def epoch_done(self, metrics: Mapping[str, float]) -> PhaseChange | None:
        """Reports one completed pass over the training data.

        Args:
            metrics: What its validation found, at least the metrics that the phase's conditions name.

        Returns:
            The change, if the epoch ended the phase.

        Raises:
            RuntimeError: The run is over.
            ValueError: A metric that a condition names is missing.
        """
        phase = self._active()
        awaited = [*(plateau.metric for plateau in self._plateaus), *self._latest]
        missing = [metric for metric in awaited if metric not in metrics]
        if missing:
            raise ValueError(f"phase {phase.name!r} waits for {missing[0]}, which was not reported")
        self._epochs += 1
        for plateau, best in self._plateaus.items():
            best.update(metrics[plateau.metric])
        for metric in self._latest:
            self._latest[metric] = metrics[metric] if math.isfinite(metrics[metric]) else None
        return self._look()

    def time_passed(self, seconds: float) -> PhaseChange | None:
        """Reports time spent since the last report.

        Returns:
            The change, if the time ended the phase.

        Raises:
            RuntimeError: The run is over.
            ValueError: The time is negative or not finite.
        """
        self._active()
        if not 0 <= seconds < math.inf:
            raise ValueError(f"expected seconds of 0 or more, got {seconds}")
        self._seconds += seconds
        return self._look()

    def state_dict(self) -> SchedulerState:
        return SchedulerState(
            index=self._index,
            epochs=self._epochs,
            steps=self._steps,
            seconds=self._seconds,
            plateaus=[best.state_dict() for best in self._plateaus.values()],
            latest=dict(self._latest),
        )

    def load_state_dict(self, state: SchedulerState) -> None:
        """Goes on exactly where a saved scheduler with the same phases stood.

        Raises:
            ValueError: The state is not one that these phases can be in.
        """
        restored = TaskScheduler(self._phases)
        if not restored._restore(state):
            raise ValueError(f"state {state} does not fit the {len(self._phases)} phases")
        vars(self).update(vars(restored))

    def _restore(self, state: SchedulerState) -> bool:
        """Takes a state over; returns whether these phases can be in it. If not, this scheduler is of no more use."""
        if not isinstance(state, dict) or state.keys() != self.state_dict().keys():
            return False
        index, epochs, steps, seconds = state["index"], state["epochs"], state["steps"], state["seconds"]
        if any(type(count) is not int or count < 0 for count in (index, epochs, steps)) or index > len(self._phases):
            return False
        self._enter(index)
        plateaus, latest = state["plateaus"], state["latest"]
        if not isinstance(plateaus, list) or not isinstance(latest, dict):
            return False
        values = [seconds, *(value for value in latest.values() if value is not None)]
        if any(type(value) not in (int, float) or not abs(value) < math.inf for value in values) or seconds < 0:
            return False
        if len(plateaus) != len(self._plateaus) or latest.keys() != self._latest.keys():
            return False
        try:
            for best, saved in zip(self._plateaus.values(), plateaus, strict=True):
                best.load_state_dict(saved)
        except ValueError:
            return False
        self._epochs, self._steps, self._seconds = epochs, steps, float(seconds)
        self._latest.update(latest)
        bests = self._plateaus.values()
        if any(best.num_since > epochs or (best.value is None) != (best.num_since == epochs) for best in bests):
            return False
        if not epochs and any(value is not None for value in latest.values()):
            return False
        if self.index is None:
            return not (epochs or steps or seconds)
        return self._reason() is None and not (self._active().evaluate_only and steps)

    def _enter(self, index: int) -> None:
        self._index = index
        self._epochs, self._steps = 0, 0
        self._seconds = 0.0
        leaves = [] if index >= len(self._phases) else list(leaves_of(self._phases[index].until))
        self._plateaus: dict[Plateau, Best] = {
            leaf: Best(leaf.direction, leaf.min_delta) for leaf in leaves if isinstance(leaf, Plateau)
        }
        self._latest: dict[str, float | None] = {leaf.metric: None for leaf in leaves if isinstance(leaf, Reached)}

    def _active(self) -> PhaseLength:
        if self._index >= len(self._phases):
            raise RuntimeError("the run is over: no phase is active")
        return self._phases[self._index]

    def _look(self) -> PhaseChange | None:
        """Ends the active phase if its length is filled."""
        reason = self._reason()
        if reason is None:
            return None
        ended = self._active().name
        self._enter(self._index + 1)
        return PhaseChange(ended, None if self.index is None else self._active().name, reason)

    def _reason(self) -> str | None:
        """Why the active phase is over; None if it is not."""
        phase = self._active()
        if phase.evaluate_only:
            return "evaluated" if self._epochs else None
        if phase.until is not None and (reason := self._holds(phase.until)):
            return reason
        for unit, done, length, limit in (
            ("epoch", self._epochs, phase.epochs, phase.max_epochs),
            ("step", self._steps, phase.steps, phase.max_steps),
        ):
            if length is not None and done >= length:
                return _done(done, unit)
            if limit is not None and done >= limit:
                return f"{_done(done, unit)}, the limit"
        return None

    def _holds(self, condition: Condition) -> str | None:
        """Why a condition holds; None if it does not."""
        match condition:
            case Plateau():
                num_since = self._plateaus[condition].num_since
                held = num_since >= condition.patience
                return (
                    f"plateau of {condition.metric} for {num_since} epoch{'' if num_since == 1 else 's'}"
                    if held
                    else None
                )
            case Reached():
                value = self._latest[condition.metric]
                sign = 1 if condition.direction == "higher" else -1
                held = value is not None and sign * value >= sign * condition.mark
                return f"{condition.metric} reached {value:.4g} (mark {condition.mark:g})" if held else None
            case Spent(amount, unit):
                done = {"epochs": self._epochs, "steps": self._steps, "seconds": self._seconds}[unit]
                return _done(done, unit.removesuffix("s")) if done >= amount else None
            case AnyOf(conditions):
                return next((reason for each in conditions if (reason := self._holds(each))), None)
            case AllOf(conditions):
                reasons = [self._holds(each) for each in conditions]
                return None if None in reasons else " and ".join(filter(None, reasons))


def _done(number: float, unit: str) -> str:
    written = f"{number:.4g}" if unit == "second" and number < 1000 else f"{number:.0f}"
    return f"{written} {unit}{'' if number == 1 else 's'} {'spent' if unit == 'second' else 'done'}"
