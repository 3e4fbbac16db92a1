"""Methods that take whole gradients: closed forms, TorchJD's own results, tasks without a gradient, refusals, runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchjd import aggregation

from crashes import SHORT, assert_same, crashed, resume, run_whole
from mtl.config import SettingError
from mtl.config.optim import BalanceConfig
from mtl.optim.balance.build import build_balance, is_by_gradients
from mtl.optim.balance.gradient_method import GradientMethod, TaskGradients
from mtl.optim.balance.gradient_methods import build_gradient_method
from mtl.optim.balance.subset import Subset

OPTIONS: dict[str, dict[str, Any]] = {"trimmedmean": {"trim_number": 1}}
THEIRS: dict[str, Any] = {"graddrop": aggregation.GradDrop, "trimmedmean": aggregation.TrimmedMean}
METHODS = sorted(THEIRS)
ROWS = torch.tensor([[1.0, -2.0, 0.5, 0.0], [-1.0, -1.0, 2.0, 3.0], [0.5, 4.0, 1.0, -1.0], [2.0, 0.0, -3.0, 1.0]])


def build(method: str, num_tasks: int = 4, **options: Any) -> GradientMethod:
    return build_gradient_method(method, OPTIONS.get(method, {}) | options, num_tasks)


def combined(method: GradientMethod, rows: Tensor, subset: Subset | None = None) -> Tensor:
    torch.manual_seed(5)
    return method.combine(TaskGradients(rows, torch.ones(len(rows)), subset=subset)).of(rows)


@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_is_that_of_torchjds_aggregator(method: str) -> None:
    assert is_by_gradients(method)
    aggregator = THEIRS[method](**OPTIONS.get(method, {}))
    torch.manual_seed(5)
    expected = aggregator(ROWS)
    assert torch.equal(combined(build(method), ROWS), expected)


def test_what_leaks_is_torchjds_too() -> None:
    leak = [0.1, 0.0, 1.0, 0.7]
    torch.manual_seed(5)
    expected = aggregation.GradDrop(leak=torch.tensor(leak))(ROWS)
    assert torch.equal(combined(build("graddrop", leak=leak), ROWS), expected)


def test_graddrop_keeps_of_each_entry_one_sign() -> None:
    found = combined(build("graddrop"), ROWS)
    torch.manual_seed(5)
    drawn = torch.rand(4)
    positive, negative = ROWS.clamp(min=0).sum(0), ROWS.clamp(max=0).sum(0)
    # Positive with the probability of its share of the sum of magnitudes: Algorithm 1 of the paper.
    share = positive / (positive - negative)
    torch.testing.assert_close(found, torch.where(drawn < share, positive, negative))
    # What leaks past the sign: all of a task with 1.
    torch.testing.assert_close(combined(build("graddrop", leak=[1.0] * 4), ROWS), ROWS.sum(0))


def test_trimmedmean_leaves_out_the_extremes_of_each_entry() -> None:
    expected = torch.tensor([(1.0 + 0.5) / 2, (-1.0 + 0.0) / 2, (0.5 + 1.0) / 2, (0.0 + 1.0) / 2])
    torch.testing.assert_close(combined(build("trimmedmean"), ROWS), expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_task_without_a_gradient_leaves_the_step(method: str) -> None:
    rows = ROWS.clone()
    rows[2] = 0
    whole = combined(build(method), rows)
    assert torch.equal(whole, combined(build(method), ROWS[[0, 1, 3]], Subset((0, 1, 3), 4)))
    assert torch.equal(whole, combined(build(method, 3), ROWS[[0, 1, 3]]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num", [0, 1])
def test_of_fewer_than_two_gradients_it_is_the_sum(method: str, num: int) -> None:
    rows = torch.zeros_like(ROWS)
    rows[:num] = ROWS[:num]
    assert torch.equal(combined(build(method), rows), rows.sum(0))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_gives_one_that_is_not(method: str, value: float) -> None:
    rows = ROWS.clone()
    rows[1, 2] = value
    assert combined(build(method), rows).isnan().all()


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("graddrop", {"f": "abs"}, "graddrop takes the options leak: got f"),
        ("graddrop", {"leak": [0.1, 0.2]}, "graddrop takes the options leak: .*entry for each of 3 tasks"),
        ("trimmedmean", {}, "trimmedmean takes the options trim_number: .*missing.*'trim_number'"),
        ("trimmedmean", {"trim_number": 2}, "trimmedmean takes the options trim_number: .*0 to 1 for 3 tasks, got 2"),
        ("trimmedmean", {"trim_number": "one"}, "trimmedmean takes the options trim_number"),
    ],
)
def test_options_that_do_not_fit_are_refused(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=rf"balance\.options: {message}"):
        build_balance(BalanceConfig(method=method, options=options), ["a", "b", "c"])


def test_too_few_gradients_in_a_step_are_an_error() -> None:
    with pytest.raises(SettingError, match="TrimmedMean cannot combine the 2 of 4 tasks that have a gradient"):
        combined(build("trimmedmean"), ROWS[:2], Subset((0, 1), 4))


def test_a_run_with_it_is_clean_and_resumes_to_the_same_bits(tmp_path: Path, cache_dir: Path) -> None:
    phases = [{"name": "all", "freeze": ["trunk@first:50%"], "steps": 6}]
    changes = {"balance": "graddrop", "optim": {}, "phases": phases}
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    whole = run_whole(tmp_path / "whole", cache_dir, {**SHORT, **changes})
    crashed(tmp_path / "broken", 4, **changes)
    assert_same(resume(tmp_path / "broken", **changes), whole)
