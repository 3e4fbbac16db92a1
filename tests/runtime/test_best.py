from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl.runtime.best import Best, Direction

CHECKED = settings(max_examples=100, derandomize=True)
NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("direction", "min_delta", "rows"),
    [
        # Each row: the value seen, whether it is a new best, the best one after it, how many came since.
        ("higher", 0.0, [(0.5, True, 0.5, 0), (0.4, False, 0.5, 1), (0.6, True, 0.6, 0), (0.55, False, 0.6, 1)]),
        ("lower", 0.0, [(0.5, True, 0.5, 0), (0.6, False, 0.5, 1), (0.4, True, 0.4, 0), (0.45, False, 0.4, 1)]),
        ("higher", 0.0, [(0.5, True, 0.5, 0), (0.5, False, 0.5, 1), (0.5, False, 0.5, 2)]),
        ("lower", 0.0, [(0.0, True, 0.0, 0), (-0.0, False, 0.0, 1), (-1.0, True, -1.0, 0)]),
        ("higher", 0.25, [(1.0, True, 1.0, 0), (1.25, False, 1.0, 1), (1.5, True, 1.5, 0), (1.75, False, 1.5, 1)]),
        ("lower", 0.25, [(1.0, True, 1.0, 0), (0.75, False, 1.0, 1), (0.5, True, 0.5, 0), (0.25, False, 0.5, 1)]),
        ("higher", 0.0, [(NAN, False, None, 1), (INF, False, None, 2), (-9.0, True, -9.0, 0), (NAN, False, -9.0, 1)]),
        ("lower", 0.0, [(-INF, False, None, 1), (NAN, False, None, 2), (9.0, True, 9.0, 0), (-INF, False, 9.0, 1)]),
    ],
)
def test_the_trace_is(
    direction: Direction, min_delta: float, rows: list[tuple[float, bool, float | None, int]]
) -> None:
    best = Best(direction, min_delta)
    assert [(value, best.update(value), best.value, best.num_since) for value, *_ in rows] == rows


def test_nothing_was_observed_at_first_and_higher_is_better_unless_said_otherwise() -> None:
    best = Best()
    assert (best.value, best.num_since) == (None, 0)
    assert [best.update(value) for value in (1.0, 2.0, 1.5)] == [True, True, False]


_VALUES = st.lists(st.sampled_from([-1.0, 0.0, 0.25, 0.5, 0.75, 1.0, NAN, INF, -INF]), max_size=20)


@CHECKED
@given(values=_VALUES, direction=st.sampled_from(["higher", "lower"]))
def test_without_a_margin_the_best_is_the_first_extreme_among_the_finite(
    values: list[float], direction: Direction
) -> None:
    best = Best(direction)
    for value in values:
        best.update(value)
    finite = [value for value in values if abs(value) < INF]
    extreme = None if not finite else max(finite) if direction == "higher" else min(finite)
    assert best.value == extreme
    assert best.num_since == (len(values) if extreme is None else len(values) - 1 - values.index(extreme))


@CHECKED
@given(before=_VALUES, after=_VALUES, other=_VALUES, direction=st.sampled_from(["higher", "lower"]))
def test_a_restored_one_has_the_same_future_whatever_it_saw_before(
    before: list[float], after: list[float], other: list[float], direction: Direction
) -> None:
    original, restored = Best(direction, 0.25), Best(direction, 0.25)
    for value in before:
        original.update(value)
    for value in other:
        restored.update(value)
    restored.load_state_dict(json.loads(json.dumps(original.state_dict())))
    assert restored.state_dict() == original.state_dict()
    assert [restored.update(value) for value in after] == [original.update(value) for value in after]
    assert restored.state_dict() == original.state_dict()


def test_a_saved_state_is_a_copy() -> None:
    best = Best()
    best.update(0.5)
    saved = best.state_dict()
    saved["value"] = 9.0
    assert best.state_dict() == {"value": 0.5, "num_since": 0}
    best.update(0.25)
    assert saved == {"value": 9.0, "num_since": 0}
