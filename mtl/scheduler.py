"""The task scheduler: which phase is active, and why it changed. A pure state machine, with no torch in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypedDict


class PhaseLength(Protocol):
    """What the scheduler has to know of a phase: its name and one of two lengths."""

    @property
    def name(self) -> str: ...
    @property
    def epochs(self) -> int | None: ...
    @property
    def steps(self) -> int | None: ...


@dataclass(frozen=True)
class PhaseChange:
    """The end of a phase.

    Attributes:
        ended: The phase that ended.
        entered: The phase that follows; None if the run is over.
        reason: Why, in words: `4 epochs done`.
    """

    ended: str
    entered: str | None
    reason: str


class SchedulerState(TypedDict):
    """The scheduler's whole state, as plain data."""

    index: int
    epochs: int
    steps: int


class TaskScheduler:
    """Goes through phases as steps and epochs are reported.

    The caller reports every optimizer step, and every completed pass over the training data, in the order in which they
    happen. A phase ends with the report that fills its length; the next one starts counting at 0.
    """

    def __init__(self, phases: Sequence[PhaseLength]) -> None:
        """Raises:
        ValueError: There is no phase, or one has not exactly one positive length.
        """
        if not phases:
            raise ValueError("expected at least one phase")
        for phase in phases:
            lengths = [length for length in (phase.epochs, phase.steps) if length is not None]
            if len(lengths) != 1 or lengths[0] < 1:
                raise ValueError(
                    f"phase {phase.name!r}: expected either epochs or steps, at least 1;"
                    f" got epochs={phase.epochs}, steps={phase.steps}"
                )
        self._phases = list(phases)
        self._state = SchedulerState(index=0, epochs=0, steps=0)

    @property
    def index(self) -> int | None:
        """The active phase's place in the list; None once the run is over."""
        return self._state["index"] if self._state["index"] < len(self._phases) else None

    def step_done(self) -> PhaseChange | None:
        """Reports one optimizer step.

        Returns:
            The change, if the step ended the phase.

        Raises:
            RuntimeError: The run is over.
        """
        phase = self._active()
        self._state["steps"] += 1
        return self._end("steps", self._state["steps"]) if self._state["steps"] == phase.steps else None

    def epoch_done(self) -> PhaseChange | None:
        """Reports one completed pass over the training data; returns and raises as `step_done`."""
        phase = self._active()
        self._state["epochs"] += 1
        return self._end("epochs", self._state["epochs"]) if self._state["epochs"] == phase.epochs else None

    def state_dict(self) -> SchedulerState:
        return self._state.copy()

    def load_state_dict(self, state: SchedulerState) -> None:
        """Goes on exactly where a saved scheduler with the same phases stood.

        Raises:
            ValueError: The state is not one that these phases can be in.
        """
        index, counts = state.get("index"), (state.get("epochs"), state.get("steps"))
        whole = all(type(number) is int and number >= 0 for number in (index, *counts))
        over = index == len(self._phases) and counts == (0, 0)
        if not whole or not (over or (index < len(self._phases) and self._is_within(*counts, self._phases[index]))):
            raise ValueError(f"state {state} does not fit the {len(self._phases)} phases")
        self._state = SchedulerState(index=index, epochs=counts[0], steps=counts[1])

    @staticmethod
    def _is_within(epochs: int, steps: int, phase: PhaseLength) -> bool:
        return (phase.epochs is None or epochs < phase.epochs) and (phase.steps is None or steps < phase.steps)

    def _active(self) -> PhaseLength:
        if self.index is None:
            raise RuntimeError("the run is over: no phase is active")
        return self._phases[self.index]

    def _end(self, unit: str, count: int) -> PhaseChange:
        ended = self._active().name
        self._state = SchedulerState(index=self._state["index"] + 1, epochs=0, steps=0)
        entered = None if self.index is None else self._active().name
        return PhaseChange(ended, entered, f"{count} {unit.removesuffix('s') if count == 1 else unit} done")
