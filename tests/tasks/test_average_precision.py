"""Average precision, against its definition worked out in numpy threshold by threshold, and against torchmetrics."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.classification import MultilabelAveragePrecision

from mtl.config import RunConfig
from mtl.tasks import Metrics, build_tasks
from mtl.tasks.average_precision import AveragePrecision, average_precision
from runs import TINY

NAN = float("nan")
NAMES = ["red", "striped", "old", "new"]


def metrics_of(*names: str) -> Metrics:
    tasks = {"tags": {"type": "multilabel", "metrics": list(names)}}
    return build_tasks(RunConfig.model_validate({**TINY, "tasks": tasks}), {"tags": NAMES})["tags"].every_metric()


def example(num: int = 60, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Outputs of few values, so that many are equal, and labels of which some are missing; one is never yes."""
    torch.manual_seed(seed)
    output = torch.randint(-9, 10, (num, 4)).double() / 4
    label = (output + 2 * torch.randn(num, 4) > 1).double()
    label[torch.rand(num, 4) < 0.3] = NAN
    label[:, 3] = torch.where(label[:, 3].isnan(), NAN, 0.0)
    return output, label


def by_definition(score: np.ndarray[Any, Any], truth: np.ndarray[Any, Any]) -> float:
    """The sum of (R[n] - R[n - 1]) P[n] over all thresholds from the highest score down."""
    total = recall = 0.0
    for threshold in sorted(set(score.tolist()), reverse=True):
        said = score >= threshold
        precision, before = (said & truth).sum() / said.sum(), recall
        recall = (said & truth).sum() / truth.sum()
        total += (recall - before) * precision
    return total


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=30))
def test_it_is_the_sum_over_thresholds(rows: list[tuple[int, bool]]) -> None:
    score = torch.tensor([row[0] for row in rows], dtype=torch.float64)
    truth = torch.tensor([row[1] for row in rows])
    found = float(average_precision(score, truth))
    if not truth.any():
        assert math.isnan(found)
    else:
        assert found == pytest.approx(by_definition(score.numpy(), truth.numpy()), rel=1e-12)


def test_by_hand() -> None:
    # Ranked yes, no, yes, no: precision 1 at recall 1/2, and 2/3 at recall 1.
    score, truth = torch.tensor([0.9, 0.8, 0.3, 0.1]), torch.tensor([True, False, True, False])
    assert float(average_precision(score, truth)) == pytest.approx((1 + 2 / 3) / 2)
    # One threshold for all: the share of yes.
    assert float(average_precision(torch.zeros(4), truth)) == 0.5


def test_it_is_that_of_torchmetrics_and_missing_labels_do_not_count() -> None:
    output, label = example()
    values = metrics_of("map", "ap")
    for part in (slice(0, 7), slice(7, 40), slice(40, 60)):
        values.update(output[part], label[part])
    found = values.compute()
    theirs = MultilabelAveragePrecision(3, average="none", ignore_index=-1)
    expected = theirs(output[:, :3].sigmoid(), label[:, :3].nan_to_num(-1).long())
    for number, name in enumerate(NAMES[:3]):
        assert found[f"ap_{name}"] == pytest.approx(float(expected[number]), rel=1e-6)
        valid = label[:, number].isfinite().numpy()
        exact = by_definition(output[:, number].numpy()[valid], label[:, number].numpy()[valid] == 1)
        assert found[f"ap_{name}"] == pytest.approx(exact, rel=1e-12)
    assert math.isnan(found["ap_new"])
    assert found["map"] == pytest.approx(sum(found[f"ap_{name}"] for name in NAMES[:3]) / 3, rel=1e-12)
    assert [values.direction(name) for name in ("map", "ap_red", "ap_new")] == ["higher"] * 3


def test_parts_are_joined_in_any_order_also_one_without_images() -> None:
    output, label = example()
    whole, *parts = (metrics_of("map", "ap") for _ in range(4))
    whole.update(output, label)
    parts[0].update(output[45:], label[45:])
    parts[2].update(output[:45], label[:45])
    again = metrics_of("map", "ap")
    for merged, *each in zip(again.parts, *(part.parts for part in parts), strict=True):
        tensors = list(zip(*(one.state() for one in each), strict=True))
        merged.load_state([sum(t) if merged.adds_up else torch.cat(t) for t in tensors])
        assert merged.adds_up != isinstance(merged, AveragePrecision)
    assert again.compute() == pytest.approx(whole.compute(), rel=1e-12, nan_ok=True)


def test_nan_is_ranked_as_the_wrong_answer_and_without_a_label_it_does_not_count() -> None:
    output, label = example()
    one, other = metrics_of("map", "ap"), metrics_of("map", "ap")
    spoilt = torch.where(label.isnan(), NAN, output)
    one.update(spoilt, label)
    other.update(output, label)
    assert one.compute() == pytest.approx(other.compute(), nan_ok=True)
    worst = metrics_of("ap")
    worst.update(torch.full_like(output, NAN), label)
    for number, name in enumerate(NAMES[:3]):
        column = label[:, number][label[:, number].isfinite()]
        assert worst.compute()[f"ap_{name}"] == pytest.approx(float(column.mean()))


def test_without_any_label_it_is_nan() -> None:
    output, label = example()
    empty = metrics_of("map", "ap")
    assert all(math.isnan(value) for value in empty.compute().values())
    empty.update(output, torch.full_like(label, NAN))
    assert all(math.isnan(value) for value in empty.compute().values())
