"""Which epochs had the best weights, by every metric that somebody goes by."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl.runtime.best import Direction
from mtl.training.best_checkpoints import BestWeights

NAN, INF = math.nan, math.inf
LOSS: tuple[str, Direction] = ("val/depth/rmse", "lower")
ACCURACY: tuple[str, Direction] = ("val/digit/accuracy", "higher")
BEST_LOSS, BEST_ACCURACY = "best-lower-val-depth-rmse", "best-higher-val-digit-accuracy"


def seen(score: float, loss: float = 0.0) -> dict[str, float]:
    return {"val/score": score, LOSS[0]: loss, "train/loss": 1.0}


@pytest.mark.parametrize(
    ("metric", "direction", "expected"),
    [
        ("val/score", "higher", "best"),
        ("val/score", "lower", "best-lower-val-score"),
        (*LOSS, BEST_LOSS),
        (*ACCURACY, BEST_ACCURACY),
        ("train/loss", "lower", "best-lower-train-loss"),
    ],
)
def test_the_link_of_a_goal_is_this(metric: str, direction: Direction, expected: str) -> None:
    assert BestWeights.link(metric, direction) == expected


def test_the_score_is_always_gone_by_and_before_any_validation_there_is_none() -> None:
    best = BestWeights([])
    assert math.isnan(best.score)
    assert best.step == 0
    assert best.record(seen(-1.0), 5) == (["best"], [])
    assert (best.score, best.step) == (-1.0, 5)


def test_every_goal_is_gone_by_once_whoever_names_it() -> None:
    best = BestWeights([None, LOSS, ("val/score", "higher"), LOSS, None])
    assert best.record(seen(0.5, 0.5), 1) == (["best", BEST_LOSS], [])
    assert list(best.state_dict()) == ["best", BEST_LOSS]


def test_the_same_metric_both_ways_is_two_goals() -> None:
    best = BestWeights([("val/score", "lower")])
    assert best.record({"val/score": 0.5}, 1)[0] == ["best", "best-lower-val-score"]
    assert best.record({"val/score": 0.75}, 2)[0] == ["best"]
    assert best.record({"val/score": 0.25}, 3)[0] == ["best-lower-val-score"]


@pytest.mark.parametrize(
    "rows",
    [
        # Each row: score, loss, the links that move, the metrics that are not finite, best score and its step after.
        [
            (0.5, 0.5, ["best", BEST_LOSS], [], 0.5, 1),
            (0.25, 0.25, [BEST_LOSS], [], 0.5, 1),
            (0.75, 0.5, ["best"], [], 0.75, 3),
            (0.5, 0.5, [], [], 0.75, 3),
        ],
        [
            (0.5, 0.5, ["best", BEST_LOSS], [], 0.5, 1),
            (0.5, 0.5, [], [], 0.5, 1),
            (0.5, 0.25, [BEST_LOSS], [], 0.5, 1),
            (0.75, 0.25, ["best"], [], 0.75, 4),
            (0.75, 0.25, [], [], 0.75, 4),
        ],
        [
            (0.5, NAN, ["best"], [LOSS[0]], 0.5, 1),
            (NAN, 0.5, [BEST_LOSS], ["val/score"], 0.5, 1),
            (NAN, NAN, [], [LOSS[0], "val/score"], 0.5, 1),
            (INF, -INF, [], [LOSS[0], "val/score"], 0.5, 1),
            (0.75, 0.25, ["best", BEST_LOSS], [], 0.75, 5),
        ],
    ],
    ids=["new bests", "ties never advance", "not finite never counts and is reported"],
)
def test_the_trace_is(rows: list[tuple[float, float, list[str], list[str], float, int]]) -> None:
    best = BestWeights([LOSS])
    for step, (score, loss, links, not_finite, best_score, best_step) in enumerate(rows, 1):
        assert best.record(seen(score, loss), step) == (links, not_finite)
        assert (best.score, best.step) == (best_score, best_step)


def test_before_there_is_a_finite_score_there_is_no_best() -> None:
    best = BestWeights([])
    assert best.record(seen(NAN), 3) == ([], ["val/score"])
    assert math.isnan(best.score)
    assert best.step == 0


def test_only_metrics_that_somebody_goes_by_are_reported_to_be_not_finite() -> None:
    assert BestWeights([]).record({"val/score": 0.5, "train/loss": NAN}, 1) == (["best"], [])


# --- state

VALUES = st.sampled_from([0.0, 0.25, 0.5, 0.75, NAN, INF])


@given(before=st.lists(st.tuples(VALUES, VALUES)), after=st.lists(st.tuples(VALUES, VALUES)))
@settings(max_examples=100, derandomize=True)
def test_a_run_resumed_continues_as_if_it_had_not_been_left(
    before: list[tuple[float, float]], after: list[tuple[float, float]]
) -> None:
    best, other = BestWeights([LOSS]), BestWeights([LOSS])
    for step, (score, loss) in enumerate(before):
        best.record(seen(score, loss), step)
    state = json.loads(json.dumps(best.state_dict(), allow_nan=False))
    other.load_state_dict(state)
    steps = other.steps
    assert steps == {link: each["step"] for link, each in state.items() if each["best"]["value"] is not None}
    for step, (score, loss) in enumerate(after, len(before)):
        assert other.record(seen(score, loss), step) == best.record(seen(score, loss), step)
        assert (other.score, other.step) == pytest.approx((best.score, best.step), nan_ok=True)


def test_goals_that_the_other_run_did_not_have_begin_again() -> None:
    old, new = BestWeights([LOSS]), BestWeights([LOSS, ACCURACY])
    old.record(seen(0.5, 0.5), 7)
    new.load_state_dict(old.state_dict())
    assert new.steps == {"best": 7, BEST_LOSS: 7}
    assert (new.score, new.step) == (0.5, 7)
    assert new.record({**seen(0.25, 0.75), ACCURACY[0]: 0.0}, 9) == ([BEST_ACCURACY], [])


def test_goals_that_only_the_other_run_had_are_let_be() -> None:
    old, new = BestWeights([LOSS]), BestWeights([])
    old.record(seen(0.5, 0.5), 7)
    new.load_state_dict(old.state_dict())
    assert new.steps == {"best": 7}
    assert list(new.state_dict()) == ["best"]


def test_a_state_without_a_best_brings_no_link() -> None:
    old, new = BestWeights([LOSS]), BestWeights([LOSS])
    old.record(seen(NAN, 0.5), 7)
    new.load_state_dict(old.state_dict())
    assert new.steps == {BEST_LOSS: 7}
    assert math.isnan(new.score)


@pytest.mark.parametrize(("link", "moved"), [("best", ["best"]), (BEST_LOSS, [BEST_LOSS]), ("best-other", [])])
def test_a_goal_that_is_forgotten_begins_again_and_the_others_continue(link: str, moved: list[str]) -> None:
    best = BestWeights([LOSS])
    best.record(seen(0.5, 0.5), 7)
    best.forget(link)
    assert math.isnan(best.score) == (link == "best")
    assert best.step == (0 if link == "best" else 7)
    # Worse in both than what was forgotten.
    assert best.record(seen(0.25, 0.75), 8)[0] == moved


def test_a_goal_that_was_forgotten_keeps_its_direction() -> None:
    best = BestWeights([LOSS])
    best.record(seen(0.5, 0.5), 1)
    best.forget(BEST_LOSS)
    assert [best.record(seen(0.0, loss), step)[0] for step, loss in enumerate((0.75, 0.5, 0.625), 2)] == [
        [BEST_LOSS],
        [BEST_LOSS],
        [],
    ]
