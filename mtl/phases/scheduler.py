"""The task scheduler: which phase is active, and why it changed. A pure state machine, with no torch in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

from mtl.phases.conditions import Observations
from mtl.phases.phase_length import PhaseLength
from mtl.runtime.best import BestState


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
        plateaus: The state of the phase's plateaus, in the order in which they are written.
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

    def steps_left(self, most: int) -> int:
        """How many of the next optimizer steps do not end the phase, as far as steps alone can end it.

        Args:
            most: No more than these are looked at.
        """
        phase, observed = self._active(), self._observed
        # Where a number of steps ends a phase, a larger one does.
        while most and phase.reason(replace(observed, steps=observed.steps + most)) is not None:
            most -= 1
        return most

    def step_done(self, number: int = 1) -> PhaseChange | None:
        """Reports one optimizer step, or several of which only the last one can end the phase.

        Returns:
            The change, if the last step ended the phase.

        Raises:
            RuntimeError: The run is over, or the phase only evaluates.
        """
        if self._active().evaluate_only:
            raise RuntimeError(f"phase {self._active().name!r} only evaluates: it has no steps")
        self._observed.steps += number
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
        missing = [metric for metric in phase.metrics if metric not in metrics]
        if missing:
            raise ValueError(f"phase {phase.name!r} waits for {missing[0]}, which was not reported")
        self._observed.epoch_done(metrics)
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
        self._observed.seconds += seconds
        return self._look()

    def state_dict(self) -> SchedulerState:
        return SchedulerState(
            index=self._index,
            epochs=self._observed.epochs,
            steps=self._observed.steps,
            seconds=self._observed.seconds,
            plateaus=[best.state_dict() for best in self._observed.bests.values()],
            latest=dict(self._observed.latest),
        )

    def load_state_dict(self, state: SchedulerState) -> None:
        """Continues exactly where a saved scheduler with the same phases was.

        Raises:
            ValueError: The state is not one that these phases can be in.
        """
        restored = TaskScheduler(self._phases)
        if not restored._restore(state):
            raise ValueError(f"state {state} does not fit the {len(self._phases)} phases")
        vars(self).update(vars(restored))

    def _restore(self, state: SchedulerState) -> bool:
        """Takes a state over; returns whether these phases can be in it. If not, this scheduler is of no more use.

        The digest of a checkpoint proves that the state is as it was saved: what can be wrong are the phases, which a
        changed configuration may have made others.
        """
        if state.keys() != self.state_dict().keys() or not 0 <= state["index"] <= len(self._phases):
            return False
        self._enter(state["index"])
        observed, plateaus, latest = self._observed, state["plateaus"], state["latest"]
        bests = list(observed.bests.values())
        if len(plateaus) != len(bests) or latest.keys() != observed.latest.keys():
            return False
        for best, saved in zip(bests, plateaus, strict=True):
            best.load_state_dict(saved)
        observed.epochs, observed.steps, observed.seconds = state["epochs"], state["steps"], state["seconds"]
        observed.latest.update(latest)
        counts = (observed.epochs, observed.steps, observed.seconds)
        if self.index is None:
            return not any(counts)
        if not all(0 <= number < math.inf for number in counts):
            return False
        # Each epoch reports one value of a metric: the best one, one since then, or only such as are not finite.
        if any(b.num_since > observed.epochs or (b.value is None) != (b.num_since == observed.epochs) for b in bests):
            return False
        if not observed.epochs and any(value is not None for value in latest.values()):
            return False
        phase = self._active()
        return phase.reason(observed) is None and not (phase.evaluate_only and observed.steps)

    def _enter(self, index: int) -> None:
        self._index = index
        self._observed = self._phases[index].begin() if index < len(self._phases) else Observations()

    def _active(self) -> PhaseLength:
        if self._index >= len(self._phases):
            raise RuntimeError("the run is over: no phase is active")
        return self._phases[self._index]

    def _look(self) -> PhaseChange | None:
        """Ends the active phase if its length is filled."""
        ended = self._active()
        reason = ended.reason(self._observed)
        if reason is None:
            return None
        self._enter(self._index + 1)
        return PhaseChange(ended.name, None if self.index is None else self._active().name, reason)
