from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl.scheduler import PhaseChange, TaskScheduler

CHECKED = settings(max_examples=100, deadline=None, derandomize=True)


@dataclass(frozen=True)
class Length:
    """All that the scheduler asks of a phase."""

    name: str
    epochs: int | None = None
    steps: int | None = None


WARM = Length("warm", epochs=2)
TUNE = Length("tune", steps=3)
LAST = Length("last", epochs=1)


def report(scheduler: TaskScheduler, events: str) -> list[PhaseChange | None]:
    """Reports events, `s` for a step and `e` for an epoch; gives what each returned."""
    return [scheduler.step_done() if event == "s" else scheduler.epoch_done() for event in events]


@pytest.mark.parametrize(
    ("phases", "events", "changes"),
    [
        ([WARM], "sse", {}),
        ([WARM], "ssesse", {5: PhaseChange("warm", None, "2 epochs done")}),
        ([WARM], "ee", {1: PhaseChange("warm", None, "2 epochs done")}),
        ([TUNE], "sss", {2: PhaseChange("tune", None, "3 steps done")}),
        ([TUNE], "seeees", {}),
        ([Length("once", steps=1)], "s", {0: PhaseChange("once", None, "1 step done")}),
        ([LAST], "sssse", {4: PhaseChange("last", None, "1 epoch done")}),
        (
            [WARM, TUNE],
            "ssesse" + "sss",
            {5: PhaseChange("warm", "tune", "2 epochs done"), 8: PhaseChange("tune", None, "3 steps done")},
        ),
        # A phase starts counting at 0: neither the steps nor the epochs of the phase before are its own.
        (
            [TUNE, WARM, LAST],
            "sess" + "see" + "se",
            {
                3: PhaseChange("tune", "warm", "3 steps done"),
                6: PhaseChange("warm", "last", "2 epochs done"),
                8: PhaseChange("last", None, "1 epoch done"),
            },
        ),
        (
            [Length("a", steps=1), Length("b", steps=1), Length("c", epochs=1)],
            "sse",
            {
                0: PhaseChange("a", "b", "1 step done"),
                1: PhaseChange("b", "c", "1 step done"),
                2: PhaseChange("c", None, "1 epoch done"),
            },
        ),
    ],
)
def test_the_trace_is(phases: list[Length], events: str, changes: dict[int, PhaseChange]) -> None:
    trace = report(TaskScheduler(phases), events)
    assert {place: change for place, change in enumerate(trace) if change is not None} == changes


def test_the_index_goes_up_by_one_and_is_none_at_the_end() -> None:
    scheduler = TaskScheduler([TUNE, LAST])
    indices = [scheduler.index]
    for event in "sesse":
        report(scheduler, event)
        indices.append(scheduler.index)
    assert indices == [0, 0, 0, 0, 1, None]


def test_the_state_counts_within_the_phase() -> None:
    scheduler = TaskScheduler([WARM, TUNE])
    report(scheduler, "sse")
    assert scheduler.state_dict() == {"index": 0, "epochs": 1, "steps": 2}
    report(scheduler, "se")
    assert scheduler.state_dict() == {"index": 1, "epochs": 0, "steps": 0}


def test_a_saved_state_is_a_copy() -> None:
    scheduler = TaskScheduler([TUNE])
    saved = scheduler.state_dict()
    saved["steps"] = 2
    assert scheduler.step_done() is None
    other = TaskScheduler([TUNE])
    other.load_state_dict(saved)
    assert other.step_done() is not None
    assert saved == {"index": 0, "epochs": 0, "steps": 2}


# Any phases, any events

_LENGTHS = st.tuples(st.sampled_from(["epochs", "steps"]), st.integers(1, 5))
_PHASES = st.lists(_LENGTHS, min_size=1, max_size=5).map(
    lambda lengths: [Length(f"phase{place}", **{unit: count}) for place, (unit, count) in enumerate(lengths)]
)
_EVENTS = st.text("ssse", max_size=60)


def ends(phases: list[Length], events: str) -> list[int]:
    """Where each phase that ends does so: at the event that fills its length, counted from the end before."""
    places: list[int] = []
    for phase in phases:
        start = places[-1] + 1 if places else 0
        unit, length = ("e", phase.epochs) if phase.epochs else ("s", phase.steps)
        own = [place for place in range(start, len(events)) if events[place] == unit]
        if len(own) < (length or 0):
            break
        places.append(own[(length or 0) - 1])
    return places


def until_the_end(phases: list[Length], events: str) -> str:
    """The events as far as the run goes."""
    places = ends(phases, events)
    return events[: places[-1] + 1] if len(places) == len(phases) else events


@CHECKED
@given(phases=_PHASES, events=_EVENTS)
def test_phases_come_in_order_and_none_exceeds_its_length(phases: list[Length], events: str) -> None:
    events = until_the_end(phases, events)
    scheduler = TaskScheduler(phases)
    at, counts = 0, {"s": 0, "e": 0}
    for event in events:
        assert scheduler.index == at
        counts[event] += 1
        (change,) = report(scheduler, event)
        phase = phases[at]
        assert counts["s"] <= (phase.steps or counts["s"])
        assert counts["e"] <= (phase.epochs or counts["e"])
        is_full = counts["s"] == phase.steps or counts["e"] == phase.epochs
        assert (change is not None) == is_full
        if change is not None:
            at, counts = at + 1, {"s": 0, "e": 0}
            assert change.ended == phase.name
            assert change.entered == (phases[at].name if at < len(phases) else None)
    assert scheduler.index == (at if at < len(phases) else None)


@CHECKED
@given(phases=_PHASES, events=_EVENTS)
def test_a_phase_ends_at_the_event_that_fills_it_and_its_reason_is_the_count(phases: list[Length], events: str) -> None:
    trace = report(TaskScheduler(phases), until_the_end(phases, events))
    changes = {place: change for place, change in enumerate(trace) if change is not None}
    assert list(changes) == ends(phases, events)
    for phase, change in zip(phases, changes.values(), strict=False):
        count, unit = (phase.epochs, "epoch") if phase.epochs else (phase.steps, "step")
        assert change.reason == f"{count} {unit}{'' if count == 1 else 's'} done"


@CHECKED
@given(phases=_PHASES, events=_EVENTS, data=st.data())
def test_a_restored_scheduler_has_the_same_future_from_any_point(
    phases: list[Length], events: str, data: st.DataObject
) -> None:
    events = until_the_end(phases, events)
    cut = data.draw(st.integers(0, len(events)))
    original, restored = TaskScheduler(phases), TaskScheduler(phases)
    report(original, events[:cut])
    restored.load_state_dict(json.loads(json.dumps(original.state_dict())))
    assert restored.index == original.index
    assert report(restored, events[cut:]) == report(original, events[cut:])
    assert restored.state_dict() == original.state_dict()


@CHECKED
@given(phases=_PHASES, events=_EVENTS)
def test_saving_changes_nothing(phases: list[Length], events: str) -> None:
    events = until_the_end(phases, events)
    watched = TaskScheduler(phases)
    trace = []
    for event in events:
        watched.load_state_dict(watched.state_dict())
        trace += report(watched, event)
    assert trace == report(TaskScheduler(phases), events)


# Errors


@pytest.mark.parametrize("event", ["s", "e"])
@pytest.mark.parametrize(("phases", "events"), [([TUNE], "sss"), ([LAST], "e"), ([LAST, TUNE], "esss")])
def test_an_event_after_the_end_is_an_error_and_changes_nothing(phases: list[Length], events: str, event: str) -> None:
    scheduler = TaskScheduler(phases)
    report(scheduler, events)
    over = scheduler.state_dict()
    with pytest.raises(RuntimeError, match="the run is over: no phase is active"):
        report(scheduler, event)
    assert scheduler.state_dict() == over
    assert scheduler.index is None


def test_no_phase_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected at least one phase"):
        TaskScheduler([])


@pytest.mark.parametrize(
    ("bad", "got"),
    [
        (Length("odd"), "epochs=None, steps=None"),
        (Length("odd", epochs=1, steps=1), "epochs=1, steps=1"),
        (Length("odd", epochs=0), "epochs=0, steps=None"),
        (Length("odd", steps=-1), "epochs=None, steps=-1"),
    ],
)
def test_a_phase_without_exactly_one_positive_length_is_an_error(bad: Length, got: str) -> None:
    with pytest.raises(ValueError) as caught:
        TaskScheduler([WARM, bad])
    assert str(caught.value) == f"phase 'odd': expected either epochs or steps, at least 1; got {got}"


@pytest.mark.parametrize(
    "state",
    [
        {"index": -1, "epochs": 0, "steps": 0},
        {"index": 3, "epochs": 0, "steps": 0},
        {"index": 2, "epochs": 0, "steps": 1},  # the run is over: nothing is left to count
        {"index": 2, "epochs": 1, "steps": 0},
        {"index": 0, "epochs": 2, "steps": 9},  # the phase would have ended
        {"index": 1, "epochs": 0, "steps": 3},
        {"index": 1, "epochs": 0, "steps": 4},
        {"index": 0, "epochs": -1, "steps": 0},
        {"index": 0, "epochs": 0, "steps": -1},
    ],
)
def test_a_state_that_the_phases_cannot_be_in_is_an_error_and_changes_nothing(state: Any) -> None:
    scheduler = TaskScheduler([WARM, TUNE])
    report(scheduler, "sse")
    with pytest.raises(ValueError) as caught:
        scheduler.load_state_dict(state)
    assert str(caught.value) == f"state {state} does not fit the 2 phases"
    assert scheduler.state_dict() == {"index": 0, "epochs": 1, "steps": 2}


@pytest.mark.parametrize(
    "state",
    [
        {"index": 0, "epochs": 1, "steps": 1000},  # a phase of epochs may have any number of steps
        {"index": 1, "epochs": 1000, "steps": 2},
        {"index": 2, "epochs": 0, "steps": 0},
    ],
)
def test_a_state_at_the_limit_is_none(state: Any) -> None:
    scheduler = TaskScheduler([WARM, TUNE])
    scheduler.load_state_dict(state)
    assert scheduler.state_dict() == state


def test_the_scheduler_has_no_torch_in_it() -> None:
    code = "import mtl.scheduler, sys; print('mtl.scheduler' in sys.modules, 'torch' in sys.modules)"
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
