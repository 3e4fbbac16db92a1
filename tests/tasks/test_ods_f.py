"""The F of edges with a tolerance, on maps made by hand and against the best of all matchings."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl.config import ConfigError, RunConfig
from mtl.tasks import Metrics, build_tasks
from mtl.tasks.ods_f import OdsF, num_matched
from runs import TINY

# Of 30 x 40 pixels, whose diagonal is 50, this is a distance of 2 pixels.
TWO_PIXELS = 0.04


def line(row: int) -> torch.Tensor:
    """A horizontal edge of 20 pixels, "1 30 40"."""
    label = torch.zeros(1, 30, 40, dtype=torch.int64)
    label[0, row, 10:30] = 1
    return label


def logits(edges: torch.Tensor, probability: float = 0.9) -> torch.Tensor:
    return torch.where(edges[:, None] == 1, probability, 1e-4).logit()


def ods_f(*pairs: tuple[torch.Tensor, torch.Tensor], distance: float = TWO_PIXELS) -> float:
    metrics = OdsF(distance)
    for output, label in pairs:
        metrics.update(output, label)
    return metrics.compute()["ods_f"]


def test_an_edge_counts_up_to_the_distance_and_not_beyond() -> None:
    assert [ods_f((logits(line(10 + off)), line(10))) for off in (0, 1, 2, 3)] == [1, 1, 1, 0]


def test_a_pixel_is_matched_once() -> None:
    # Two parallel lines of 20 pixels, one true: 20 of 40 predicted, 20 of 20 true.
    both = line(9) | line(11)
    assert ods_f((logits(both), line(10))) == pytest.approx(2 * 20 / (40 + 20))


def test_the_best_threshold_is_that_of_the_set_not_of_each_image() -> None:
    # The first image is right above .3, the second one below: together, no threshold is right for both.
    first = torch.maximum(logits(line(10), 0.9), logits(line(20), 0.3))
    second = logits(line(10), 0.2)
    alone = [ods_f((first, line(10))), ods_f((second, line(10)))]
    # Below .2: 60 predicted, 40 true, 40 matched. Above .3: 20 predicted, 40 true, 20 matched.
    assert alone == [1, 1] and ods_f((first, line(10)), (second, line(10))) == pytest.approx(2 * 40 / 100)


def test_thick_predictions_are_thinned_and_unlabelled_pixels_do_not_count() -> None:
    thick = line(9) | line(10) | line(11)
    assert ods_f((logits(thick), line(10))) > 0.9
    label = line(10)
    label[0, 20] = 255
    assert ods_f((logits(line(10) | line(20)), label)) == 1
    assert np.isnan(ods_f((logits(line(10)), torch.full_like(label, 255))))


def test_states_add_up_and_nan_is_worst() -> None:
    one, other, whole = OdsF(TWO_PIXELS), OdsF(TWO_PIXELS), OdsF(TWO_PIXELS)
    for metrics, row in ((one, 10), (other, 12)):
        metrics.update(logits(line(row)), line(10))
        whole.update(logits(line(row)), line(10))
    one.load_state([a + b for a, b in zip(one.state(), other.state(), strict=True)])
    assert one.compute() == whole.compute()
    assert ods_f((torch.full((1, 1, 30, 40), float("nan")), line(10))) < 0.1


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_as_many_pixels_are_matched_as_can_be(seed: int) -> None:
    generator = np.random.default_rng(seed)
    predicted, true = (generator.random((4, 4)) < 0.3 for _ in range(2))
    places, targets = np.argwhere(predicted)[:5], np.argwhere(true)[:5]
    maps = [np.zeros((4, 4), dtype=bool) for _ in range(2)]
    for each, points in zip(maps, (places, targets), strict=True):
        each[tuple(points.T)] = True
    few, many = sorted([places, targets], key=len)
    best = max(
        (
            sum(float(np.hypot(*(a - many[b]))) <= 1.5 for a, b in zip(few, order, strict=True))
            for order in itertools.permutations(range(len(many)), len(few))
        ),
        default=0,
    )
    assert num_matched(maps[0], maps[1], 1.5) == best


def edges(metrics: Any) -> Metrics:
    config = {**TINY, "tasks": {"edge": {"type": "edges", "metrics": metrics}}}
    return build_tasks(RunConfig.model_validate(config))["edge"].every_metric()


def test_it_is_added_by_name_with_its_distance() -> None:
    for distance, expected in ((0.011, 0.0), (TWO_PIXELS, 1.0)):
        metrics = edges({"name": "ods_f", "options": {"max_distance": distance}})
        metrics.update(logits(line(12)), line(10))
        assert metrics.compute()["ods_f"] == expected
    with pytest.raises(ConfigError, match=r"edge\.metrics\.0\.options\.max_distanc: unknown key; nearest: max_dist"):
        edges({"name": "ods_f", "options": {"max_distanc": 1}})


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)
    message = r"edge\.metrics\.0\.name: ods_f: needs the extra `research` .* pip install scikit-image"
    with pytest.raises(ConfigError, match=message):
        edges("ods_f")
