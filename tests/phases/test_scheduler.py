from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl.phases.conditions import AllOf, AnyOf, Condition, Plateau, Reached, Spent
from mtl.phases.phase_length import PhaseLength
from mtl.phases.scheduler import PhaseChange, TaskScheduler

CHECKED = settings(max_examples=100, derandomize=True)
NAN, INF = math.nan, math.inf

# `s` is a step, a number the seconds that passed, a dictionary an epoch's metrics, `e` an epoch without metrics.
Event = str | float | dict[str, float]


def report(scheduler: TaskScheduler, events: Sequence[Event]) -> list[PhaseChange | None]:
    """Reports events; gives what each returned."""
    changes = []
    for event in events:
        if isinstance(event, float):
            changes.append(scheduler.time_passed(event))
        elif event == "s":
            changes.append(scheduler.step_done())
        else:
            changes.append(scheduler.epoch_done(event if isinstance(event, dict) else {}))
    return changes


def m(*values: float) -> list[Event]:
    """Epochs with these values of the metric m."""
    return [{"m": value} for value in values]


def until(condition: Condition, max_epochs: int | None = 9, max_steps: int | None = None) -> PhaseLength:
    return PhaseLength("p", until=condition, max_epochs=max_epochs, max_steps=max_steps)


WARM = PhaseLength("warm", epochs=2)
TUNE = PhaseLength("tune", steps=3)
LAST = PhaseLength("last", epochs=1)
LOOK = PhaseLength("look", evaluate_only=True)
FLAT = Plateau("m", patience=2)
HIGH, LOW = Reached("m", 0.75), Reached("m", 0.25, "lower")
STEPS = Spent(3, "steps")


@pytest.mark.parametrize(
    ("phase", "events", "reason"),
    [
        (WARM, "ssesse", "2 epochs done"),
        (WARM, ["e", 900.0, "e"], "2 epochs done"),
        (LAST, "sssse", "1 epoch done"),
        (TUNE, "sss", "3 steps done"),
        (TUNE, ["s", "e", "e", "e", "e", "s", 900.0], None),
        (PhaseLength("once", steps=1), "s", "1 step done"),
        (LOOK, ["e"], "evaluated"),
        (LOOK, [900.0, {"m": NAN}], "evaluated"),
        # A plateau; more of it below, and in test_best.py
        (until(Plateau("m")), m(0.1, 0.2, 0.3, 0.2), "plateau of m for 1 epoch"),
        (until(FLAT), m(0.5, 0.4, 0.6, 0.5, 0.7, 0.1), None),
        (until(FLAT), m(NAN, NAN), "plateau of m for 2 epochs"),
        (until(Plateau("m", 2, "lower")), m(0.5, 0.4, 0.3, 0.2), None),
        (until(Plateau("val/k")), [{"val/k": 1.0, "m": 0.0}, {"val/k": 0.0, "m": 1.0}], "plateau of val/k for 1 epoch"),
        # A mark: at it will do; only the latest value counts.
        (until(HIGH), m(0.5, 0.74, 0.75), "m reached 0.75 (mark 0.75)"),
        (until(HIGH), m(NAN, -INF, INF, 0.876543), "m reached 0.8765 (mark 0.75)"),
        (until(LOW), m(0.5, 0.26, 0.25), "m reached 0.25 (mark 0.25)"),
        (until(LOW), m(NAN, -INF, -3.0), "m reached -3 (mark 0.25)"),
        # Time, whole or not
        (until(Spent(1, "seconds")), [0.5, "s", "e", 0.0, 0.5], "1 second spent"),
        (until(Spent(0.5, "seconds")), [0.25, 0.5], "0.75 seconds spent"),
        (until(Spent(90, "seconds")), [89.0, "s", "e"], None),
        (until(Spent(1.5, "epochs")), "ssese", "2 epochs done"),
        (until(Spent(1, "steps")), "es", "1 step done"),
        # Groups: the first that holds gives the reason; of all, each does.
        (until(AnyOf((FLAT, HIGH))), m(0.5, 0.5, 0.75), "m reached 0.75 (mark 0.75)"),
        (until(AnyOf((FLAT, HIGH))), m(NAN, NAN), "plateau of m for 2 epochs"),
        (until(AnyOf((LOW, STEPS, HIGH))), ["s", "s", {"m": 0.5}, "s"], "3 steps done"),
        (until(AnyOf((Spent(1, "epochs"), HIGH))), m(1.0), "1 epoch done"),
        (until(AnyOf((HIGH, Spent(1, "epochs")))), m(1.0), "m reached 1 (mark 0.75)"),
        (until(AllOf((FLAT, STEPS))), ["s", "s", *m(0.5, 0.5, 0.5)], None),
        (until(AllOf((FLAT, STEPS))), [*m(0.5, 0.5, 0.5, 0.5), *"sss"], "plateau of m for 3 epochs and 3 steps done"),
        (until(AllOf((FLAT, STEPS))), [*m(0.5, 0.5, 0.5, 0.75), *"sss"], None),
        (until(AllOf((HIGH, STEPS))), [*m(1.0, NAN), *"ssss"], None),
        (
            until(AllOf((STEPS, AnyOf((HIGH, AllOf((Spent(9, "seconds"), LOW))))))),
            [*m(1.0, 0.5), *"sss", 9.0, *m(0.5, 0.0)],
            "3 steps done and 9 seconds spent and m reached 0 (mark 0.25)",
        ),
        # The limits
        (until(HIGH, max_epochs=2), m(0.5, 0.5), "2 epochs done, the limit"),
        (until(HIGH, max_epochs=1), m(0.5), "1 epoch done, the limit"),
        (until(HIGH, max_epochs=None, max_steps=3), ["s", *m(0.5, 0.5), "s", "s"], "3 steps done, the limit"),
        (until(HIGH, max_epochs=2, max_steps=3), [*"ss", *m(0.5, 0.5)], "2 epochs done, the limit"),
        (until(HIGH, max_epochs=2, max_steps=3), [*"ss", *m(0.5), "s"], "3 steps done, the limit"),
        # If the condition holds with the event that fills the limit, it gives the reason.
        (until(HIGH, max_epochs=2), m(0.5, 0.75), "m reached 0.75 (mark 0.75)"),
        (until(STEPS, max_epochs=None, max_steps=3), "sss", "3 steps done"),
        (until(AllOf((HIGH, STEPS)), max_steps=3), [*m(1.0), *"sss"], "m reached 1 (mark 0.75) and 3 steps done"),
    ],
)
def test_a_phase_ends_with_its_last_event_for_the_reason(
    phase: PhaseLength, events: Sequence[Event], reason: str | None
) -> None:
    end = None if reason is None else PhaseChange(phase.name, None, reason)
    assert report(TaskScheduler([phase]), events) == [None] * (len(events) - 1) + [end]


@pytest.mark.parametrize(
    ("phases", "events", "changes"),
    [
        (
            [TUNE, WARM, LAST],
            "sess" + "see" + "se",
            {
                3: ("tune", "warm", "3 steps done"),
                6: ("warm", "last", "2 epochs done"),
                8: ("last", None, "1 epoch done"),
            },
        ),
        (
            [PhaseLength("a", steps=1), LOOK, PhaseLength("b", steps=1)],
            "ses",
            {0: ("a", "look", "1 step done"), 1: ("look", "b", "evaluated"), 2: ("b", None, "1 step done")},
        ),
        (  # neither the time nor the latest metric of the phase before is the next one's own
            [until(AllOf((HIGH, Spent(2, "seconds")))), until(AllOf((HIGH, Spent(3, "seconds")))), LAST],
            [2.0, *m(1.0), "s", 3.0, *m(1.0)],
            {
                1: ("p", "p", "m reached 1 (mark 0.75) and 2 seconds spent"),
                4: ("p", "last", "m reached 1 (mark 0.75) and 3 seconds spent"),
            },
        ),
    ],
)
def test_a_phase_starts_counting_at_zero(
    phases: list[PhaseLength], events: Sequence[Event], changes: dict[int, tuple[str, str | None, str]]
) -> None:
    trace = enumerate(report(TaskScheduler(phases), events))
    assert {place: (each.ended, each.entered, each.reason) for place, each in trace if each is not None} == changes


def test_a_plateau_forgets_its_best_and_its_patience_with_each_change() -> None:
    phases = [
        PhaseLength("a", until=FLAT, max_epochs=9),
        PhaseLength("b", until=Plateau("m", 2, "lower"), max_epochs=9),
        PhaseLength("c", until=Plateau("m", 2, min_delta=0.25), max_epochs=9),
        PhaseLength("d", until=Plateau("m", 1), max_epochs=3),
    ]
    scheduler = TaskScheduler(phases)
    rows: list[tuple[float, int, int, list[tuple[float | None, int]], PhaseChange | None]] = [
        # The value; then the index, the epochs, best value and epochs since, and the change.
        (0.5, 0, 1, [(0.5, 0)], None),
        (0.7, 0, 2, [(0.7, 0)], None),
        (0.7, 0, 3, [(0.7, 1)], None),
        (0.6, 1, 0, [(None, 0)], PhaseChange("a", "b", "plateau of m for 2 epochs")),
        (0.9, 1, 1, [(0.9, 0)], None),
        (0.8, 1, 2, [(0.8, 0)], None),
        (INF, 1, 3, [(0.8, 1)], None),
        (-INF, 2, 0, [(None, 0)], PhaseChange("b", "c", "plateau of m for 2 epochs")),
        (NAN, 2, 1, [(None, 1)], None),
        (0.5, 2, 2, [(0.5, 0)], None),
        (0.75, 2, 3, [(0.5, 1)], None),
        (1.0, 2, 4, [(1.0, 0)], None),
        (1.25, 2, 5, [(1.0, 1)], None),
        (0.0, 3, 0, [(None, 0)], PhaseChange("c", "d", "plateau of m for 2 epochs")),
        (0.1, 3, 1, [(0.1, 0)], None),
        (0.2, 3, 2, [(0.2, 0)], None),
        (0.3, 4, 0, [], PhaseChange("d", None, "3 epochs done, the limit")),
    ]
    for value, *expected in rows:
        (change,) = report(scheduler, m(value))
        state = scheduler.state_dict()
        plateaus = [(best["value"], best["num_since"]) for best in state["plateaus"]]
        assert [state["index"], state["epochs"], plateaus, change] == expected


def test_large_counts_are_written_out() -> None:
    scheduler = TaskScheduler([PhaseLength("long", steps=1_234_567)])
    scheduler.load_state_dict({**scheduler.state_dict(), "steps": 1_234_566})
    assert report(scheduler, "s") == [PhaseChange("long", None, "1234567 steps done")]


# Any phases, any events

_METRICS, _DIRECTIONS = st.sampled_from(["m", "k"]), st.sampled_from(["higher", "lower"])
_MARKS = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])  # binary fractions: sums and differences are exact
_LEAVES = (
    st.builds(Plateau, _METRICS, st.integers(1, 3), _DIRECTIONS, st.sampled_from([0.0, 0.25]))
    | st.builds(Reached, _METRICS, _MARKS, _DIRECTIONS)
    | st.builds(Spent, st.sampled_from([1, 2, 2.5, 4]), st.sampled_from(["epochs", "steps", "seconds"]))
)
_GROUPS = st.sampled_from([AnyOf, AllOf])
_CONDITIONS: st.SearchStrategy[Condition] = st.recursive(
    _LEAVES, lambda each: st.builds(lambda g, some: g(some), _GROUPS, st.lists(each, min_size=1, max_size=3).map(tuple))
)
_LIMITS = st.sampled_from([{"max_epochs": 4}, {"max_steps": 6}, {"max_epochs": 3, "max_steps": 4}])
_UNTIL = st.builds(lambda condition, limits: {"until": condition, **limits}, _CONDITIONS, _LIMITS)
_COUNTED: st.SearchStrategy[dict[str, Any]] = st.sampled_from(
    [{"epochs": 1}, {"epochs": 3}, {"steps": 1}, {"steps": 5}, {"evaluate_only": True}]
)
_PHASES = st.lists(_UNTIL | _UNTIL | _COUNTED, min_size=1, max_size=5).map(
    lambda lengths: [PhaseLength(f"phase{place}", **length) for place, length in enumerate(lengths)]
)
_VALUES = _MARKS | st.sampled_from([NAN, INF, -INF])
_EPOCHS = st.fixed_dictionaries({"m": _VALUES, "k": _VALUES})
_EVENTS = st.lists(st.just("s") | _EPOCHS | st.sampled_from([0.0, 0.25, 0.5, 2.0]), min_size=20, max_size=60)


def playable(phases: list[PhaseLength], events: list[Event]) -> list[Event]:
    """The events as far as the run goes, without steps in phases that only evaluate."""
    scheduler = TaskScheduler(phases)
    kept: list[Event] = []
    for event in events:
        if scheduler.index is not None and not (event == "s" and phases[scheduler.index].evaluate_only):
            report(scheduler, [event])
            kept.append(event)
    return kept


def totals(history: list[Event]) -> dict[str, float]:
    num_epochs = len([event for event in history if isinstance(event, dict)])
    seconds = sum(event for event in history if isinstance(event, float))
    return {"epochs": num_epochs, "steps": history.count("s"), "seconds": seconds}


def amount(history: list[Event], unit: str) -> str:
    total = totals(history)[unit]
    return f"{total:g} {unit[:-1] if total == 1 else unit} {'spent' if unit == 'seconds' else 'done'}"


def last_best(values: list[float], plateau: Plateau) -> int:
    """The place of the last value that beat those before it; -1 if none did."""
    if not values:
        return -1
    before, sign = last_best(values[:-1], plateau), 1 if plateau.direction == "higher" else -1
    is_best = before < 0 or sign * (values[-1] - values[before]) > plateau.min_delta
    return len(values) - 1 if abs(values[-1]) < INF and is_best else before


def holds(condition: Condition, history: list[Event]) -> str:
    """Why a condition holds after a phase's events, from all of them; empty if it does not."""
    if isinstance(condition, AnyOf):
        return [*filter(None, [holds(each, history) for each in condition.conditions]), ""][0]
    if isinstance(condition, AllOf):
        parts = [holds(each, history) for each in condition.conditions]
        return " and ".join(parts) if all(parts) else ""
    if isinstance(condition, Spent):
        is_spent = totals(history)[condition.unit] >= condition.amount
        return amount(history, condition.unit) if is_spent else ""
    values = [event[condition.metric] for event in history if isinstance(event, dict)]
    if isinstance(condition, Plateau):
        since = len(values) - 1 - last_best(values, condition)
        text = f"plateau of {condition.metric} for {since} epoch{'' if since == 1 else 's'}"
        return text if since >= condition.patience else ""
    if not values or not abs(values[-1]) < INF:
        return ""
    at_it = values[-1] >= condition.mark if condition.direction == "higher" else values[-1] <= condition.mark
    return f"{condition.metric} reached {values[-1]:g} (mark {condition.mark:g})" if at_it else ""


def expected_reason(phase: PhaseLength, history: list[Event]) -> str:
    """Why a phase is over after its events, from all of them; empty if it is not."""
    done = totals(history)
    reasons = [
        "evaluated" if phase.evaluate_only and done["epochs"] else "",
        holds(phase.until, history) if phase.until else "",
        amount(history, "epochs") if done["epochs"] == phase.epochs else "",
        amount(history, "steps") if done["steps"] == phase.steps else "",
        amount(history, "epochs") + ", the limit" if done["epochs"] == phase.max_epochs else "",
        amount(history, "steps") + ", the limit" if done["steps"] == phase.max_steps else "",
    ]
    return [*filter(None, reasons), ""][0]


@CHECKED
@given(phases=_PHASES, events=_EVENTS)
def test_phases_come_in_order_within_their_bounds_and_end_exactly_when_their_history_says_so(
    phases: list[PhaseLength], events: list[Event]
) -> None:
    scheduler = TaskScheduler(phases)
    names = [*(phase.name for phase in phases), None]
    at, history = 0, list[Event]()
    for event in playable(phases, events):
        (change,) = report(scheduler, [event])
        history.append(event)
        phase, done, reason = phases[at], totals(history), expected_reason(phases[at], history)
        assert change == (PhaseChange(phase.name, names[at + 1], reason) if reason else None)
        assert done["epochs"] <= min(phase.epochs or INF, phase.max_epochs or INF, 1 if phase.evaluate_only else INF)
        assert done["steps"] <= min(phase.steps or INF, phase.max_steps or INF, 0 if phase.evaluate_only else INF)
        if reason:
            at, history = at + 1, []
        state = scheduler.state_dict()
        assert (state["index"], scheduler.index) == (at, at if at < len(phases) else None)
        assert {"epochs": state["epochs"], "steps": state["steps"], "seconds": state["seconds"]} == totals(history)


@CHECKED
@given(phases=_PHASES, events=_EVENTS, data=st.data())
def test_a_restored_scheduler_has_the_same_future_from_any_point_whatever_its_past(
    phases: list[PhaseLength], events: list[Event], data: st.DataObject
) -> None:
    events = playable(phases, events)
    cut, past = data.draw(st.integers(0, len(events))), data.draw(st.integers(0, len(events)))
    original, restored = TaskScheduler(phases), TaskScheduler(phases)
    report(original, events[:cut])
    report(restored, events[:past])
    restored.load_state_dict(json.loads(json.dumps(original.state_dict(), allow_nan=False)))
    assert (restored.index, restored.state_dict()) == (original.index, original.state_dict())
    for event in events[cut:]:
        assert report(restored, [event]) == report(original, [event])
        assert restored.state_dict() == original.state_dict()


@CHECKED
@given(phases=_PHASES, events=_EVENTS)
def test_saving_changes_nothing_and_what_was_saved_is_a_copy(phases: list[PhaseLength], events: list[Event]) -> None:
    events = playable(phases, events)
    watched, alone = TaskScheduler(phases), TaskScheduler(phases)
    for event in events:
        saved: dict[str, Any] = dict(watched.state_dict())
        for best in saved["plateaus"]:
            best.update(value=0.5, num_since=0)
        saved["plateaus"].clear()
        saved["latest"].clear()
        assert report(watched, [event]) == report(alone, [event])
        assert watched.state_dict() == watched.state_dict() == alone.state_dict()


# Errors

WAIT = PhaseLength("wait", until=AnyOf((Plateau("m", patience=4), Reached("k", 0.75))), max_epochs=6, max_steps=9)
BESTS = [{"value": 0.5, "num_since": 1}]
STANDING = {"index": 2, "epochs": 2, "steps": 3, "seconds": 1.5, "plateaus": BESTS, "latest": {"k": 0.25}}
FRESH = {"index": 0, "epochs": 0, "steps": 0, "seconds": 0.0, "plateaus": [], "latest": {}}


def standing() -> TaskScheduler:
    """A scheduler inside the third of its phases WARM, TUNE, WAIT, LOOK."""
    scheduler = TaskScheduler([WARM, TUNE, WAIT, LOOK])
    report(scheduler, ["e", "e", *"sss", *"ss", {"m": 0.5, "k": NAN}, 1.5, "s", {"m": 0.5, "k": 0.25}])
    assert scheduler.state_dict() == STANDING
    return scheduler


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ({"m": 0.5}, "phase 'wait' waits for k, which was not reported"),
        ({"k": 0.5}, "phase 'wait' waits for m, which was not reported"),
        ("e", "phase 'wait' waits for [mk], which was not reported"),
        (-0.5, "expected seconds of 0 or more, got -0.5"),
        (NAN, "expected seconds of 0 or more, got nan"),
        (INF, "expected seconds of 0 or more, got inf"),
    ],
)
def test_a_refused_event_is_an_error_and_changes_nothing(event: Event, message: str) -> None:
    scheduler = standing()
    with pytest.raises(ValueError, match=f"^{message}$"):
        report(scheduler, [event])
    assert scheduler.state_dict() == STANDING


@pytest.mark.parametrize(
    ("phases", "before", "events", "message"),
    [
        ([LOOK, TUNE], "", ["s"], "phase 'look' only evaluates: it has no steps"),
        ([TUNE, LOOK], "sss", ["s"], "phase 'look' only evaluates: it has no steps"),
        ([TUNE], "sss", ["s", "e", 1.0], "the run is over: no phase is active"),
        ([LAST, LOOK], "ee", ["s", "e", 1.0], "the run is over: no phase is active"),
    ],
)
def test_an_event_that_no_phase_is_there_to_take_is_an_error_and_changes_nothing(
    phases: list[PhaseLength], before: str, events: list[Event], message: str
) -> None:
    scheduler = TaskScheduler(phases)
    report(scheduler, before)
    state, index = scheduler.state_dict(), scheduler.index
    for event in events:
        with pytest.raises(RuntimeError, match=f"^{message}$"):
            report(scheduler, [event])
        assert (scheduler.state_dict(), scheduler.index) == (state, index)


def test_no_phase_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^expected at least one phase$"):
        TaskScheduler([])


@pytest.mark.parametrize(
    "state",
    [
        *({**STANDING, "index": index} for index in (-1, 0, 1, 3, 4, 5)),
        *({**STANDING, "epochs": epochs} for epochs in (-1, 6, 7)),
        *({**STANDING, "steps": steps} for steps in (-1, 9, 10)),
        *({**STANDING, "seconds": seconds} for seconds in (-0.5, NAN, INF)),
        *({**STANDING, "plateaus": plateaus} for plateaus in ([], [*BESTS, *BESTS])),
        {**STANDING, "plateaus": [{"value": 0.5, "num_since": 4}]},
        *({**STANDING, "latest": {"k": value}} for value in (0.75, NAN, INF)),
        *({**STANDING, "latest": latest} for latest in ({}, {"m": 0.25}, {"k": 0.25, "m": 0.25})),
        *({name: value for name, value in STANDING.items() if name != missing} for missing in STANDING),
        # Metrics that the epochs cannot have reported: a best one and 2 since are 3 epochs, not 2
        {**STANDING, "plateaus": [{"value": 0.5, "num_since": 2}]},
        {**STANDING, "plateaus": [{"value": None, "num_since": 1}]},
        {**STANDING, "epochs": 0, "plateaus": [{"value": None, "num_since": 0}]},
        {**STANDING, "more": 0},
        *({**FRESH, **more} for more in ({"epochs": 2}, {"index": 5}, {"index": 1, "steps": 3})),
        *({**FRESH, "index": 3, unit: 1} for unit in ("epochs", "steps")),  # a phase that only evaluates has neither
        *({**FRESH, "index": 4, unit: 1} for unit in ("epochs", "steps", "seconds")),  # over: nothing is left to count
        *({**FRESH, "index": 4, **more} for more in ({"plateaus": BESTS}, {"latest": {"k": None}})),
    ],
    ids=str,
)
def test_a_state_that_the_phases_cannot_be_in_is_an_error_and_changes_nothing(state: Any) -> None:
    scheduler = standing()
    with pytest.raises(ValueError) as caught:
        scheduler.load_state_dict(state)
    assert str(caught.value) == f"state {state} does not fit the 4 phases"
    assert scheduler.state_dict() == STANDING


@pytest.mark.parametrize(
    "state",
    [
        {**FRESH, "epochs": 1, "steps": 1000},  # a phase of epochs may have any number of steps
        {**FRESH, "index": 1, "epochs": 1000, "steps": 2},
        {**STANDING, "epochs": 5, "steps": 8, "plateaus": [{"value": -0.5, "num_since": 3}], "latest": {"k": 0.7}},
        {**STANDING, "epochs": 3, "plateaus": [{"value": None, "num_since": 3}], "latest": {"k": None}},
        {**FRESH, "index": 3, "seconds": 3600.0},
        {**FRESH, "index": 4},
    ],
    ids=str,
)
def test_a_state_just_short_of_the_limits_is_taken(state: Any) -> None:
    scheduler = standing()
    scheduler.load_state_dict(state)
    assert scheduler.state_dict() == state


def test_the_scheduler_has_no_torch_in_it() -> None:
    code = "import mtl.phases.scheduler, sys; print('mtl.phases.scheduler' in sys.modules, 'torch' in sys.modules)"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
