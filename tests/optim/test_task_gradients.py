"""Gradient analysis: numbers by hand, a float64 reference, what it must leave alone, and when a run does it."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import wandb_file
from mtl.optim.task_gradients import GradientAnalysis, Pair, analyse, trunk_groups
from mtl.runtime.files import without_nan
from mtl.training.run import train
from mtl.training.setup import RunSetup
from mtl.training.tracking.gradient_figure import draw_gradients, png_of
from mtl.training.tracking.gradients import GradientLog
from mtl.training.tracking.steps import StepLog
from mtl.training.tracking.tracker import Tracker
from runs import read_metrics, tiny_parts

NAN = pytest.approx(math.nan, nan_ok=True)


def parameter(*values: float, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def of(losses: dict[str, Tensor], groups: dict[str, list[nn.Parameter]]) -> GradientAnalysis:
    analysis = analyse(losses, groups)
    assert analysis is not None
    return analysis


# By hand


def test_two_parameters_by_hand() -> None:
    stem, block = parameter(1.0, 2.0), parameter(5.0)
    losses = {
        "a": 3 * stem[0] + 4 * stem[1],  # (3, 4 | unreached)
        "b": -2 * stem[0] + 0 * stem[1] + 0 * block[0],  # (-2, 0 | 0)
        "c": 4 * stem[1] + 3 * block[0],  # (0, 4 | 3)
    }
    analysis = of(losses, {"00 stem": [stem], "01 block": [block]})
    assert analysis == GradientAnalysis(
        groups=("00 stem", "01 block"),
        norms={
            "a": {"00 stem": 5.0, "01 block": 0.0},
            "b": {"00 stem": 2.0, "01 block": 0.0},
            "c": {"00 stem": 4.0, "01 block": 3.0},
        },
        total_norms={"a": 5.0, "b": 2.0, "c": 5.0},
        reached={
            "a": frozenset({"00 stem"}),
            "b": frozenset({"00 stem", "01 block"}),
            "c": frozenset({"00 stem", "01 block"}),
        },
        pairs=(
            Pair(("a", "b"), pytest.approx(-6 / (5 * 2)), pytest.approx(2 * 5 * 2 / (25 + 4))),
            Pair(("a", "c"), pytest.approx(16 / (5 * 5)), 1.0),
            Pair(("b", "c"), 0.0, pytest.approx(2 * 2 * 5 / (4 + 25))),
        ),
    )
    assert [pair.conflicts for pair in analysis.pairs] == [True, False, False]
    assert analysis.conflict_share == pytest.approx(1 / 3) and analysis.unreached == ()
    assert {key: value for key, value in analysis.to_row().items() if "/b" not in key} == {
        "grad/norm/a": 5.0,
        "grad/norm/a/00 stem": 5.0,
        "grad/norm/c": 5.0,
        "grad/norm/c/00 stem": 4.0,
        "grad/norm/c/01 block": 3.0,
        "grad/cosine/a/c": pytest.approx(16 / 25),
        "grad/magnitude_similarity/a/c": 1.0,
        "grad/conflict_share": pytest.approx(1 / 3),
        "grad/unreached": 0,
    }
    assert analysis.to_row()["grad/norm/b/01 block"] == 0.0


def test_a_group_that_no_task_reaches_is_named_and_one_with_a_zero_gradient_is_not() -> None:
    w, zero, far = parameter(2.0), parameter(1.0), parameter(1.0)
    analysis = of({"a": w[0] ** 2 + 0 * zero[0], "b": w[0]}, {"w": [w], "zero": [zero], "far": [far]})
    assert analysis.unreached == ("far",) and analysis.to_row()["grad/unreached"] == 1
    assert analysis.reached == {"a": frozenset({"w", "zero"}), "b": frozenset({"w"})}


def test_a_zero_gradient_has_no_cosine_and_is_in_no_conflict() -> None:
    w = parameter(1.0, 1.0)
    analysis = of({"zero": 0 * w.sum(), "a": w[0], "b": -w[0]}, {"w": [w]})
    assert analysis.pairs == (
        Pair(("zero", "a"), NAN, 0.0),
        Pair(("zero", "b"), NAN, 0.0),
        Pair(("a", "b"), -1.0, 1.0),
    )
    assert [pair.conflicts for pair in analysis.pairs] == [False, False, True]
    assert analysis.conflict_share == 1.0, "of the one pair that has a cosine"
    both = of({"x": 0 * w.sum(), "y": 0 * w.sum()}, {"w": [w]})
    assert both.pairs == (Pair(("x", "y"), NAN, NAN),) and math.isnan(both.conflict_share)


def test_a_loss_without_a_graph_reaches_nothing() -> None:
    w = parameter(1.0)
    analysis = of({"constant": torch.tensor(3.0), "a": w.sum()}, {"w": [w]})
    assert analysis.reached == {"constant": frozenset(), "a": frozenset({"w"})}
    assert analysis.norms == {"constant": {"w": 0.0}, "a": {"w": 1.0}}


def test_one_task_has_norms_but_no_pairs() -> None:
    w = parameter(1.0)
    assert of({"a": 2 * w.sum()}, {"w": [w]}).to_row() == {
        "grad/norm/a": 2.0,
        "grad/norm/a/w": 2.0,
        "grad/unreached": 0,
    }


def test_what_is_frozen_is_left_out_and_without_anything_else_there_is_no_analysis() -> None:
    frozen, w = parameter(1.0).requires_grad_(False), parameter(1.0)
    losses = {"a": (3 * frozen + 4 * w).sum(), "b": -w.sum()}
    analysis = of(losses, {"frozen": [frozen], "mixed": [frozen, w]})
    assert analysis.groups == ("mixed",) and analysis.total_norms == {"a": 4.0, "b": 1.0}
    assert analyse(losses, {"frozen": [frozen]}) is None
    assert analyse(losses, {}) is None and analyse({}, {"w": [w]}) is None


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_gradient_that_is_not_finite_is_nan_and_touches_no_other_task(bad: float) -> None:
    w, v = parameter(1.0, 1.0), parameter(1.0)
    analysis = of({"bad": bad * w[0] + v[0], "a": w[1] * 2, "b": w[1]}, {"w": [w], "v": [v]})
    assert analysis.norms["bad"] == {"w": NAN, "v": 1.0} and analysis.total_norms["bad"] == NAN
    assert analysis.norms["a"] == {"w": 2.0, "v": 0.0}
    assert analysis.pairs == (Pair(("bad", "a"), NAN, NAN), Pair(("bad", "b"), NAN, NAN), Pair(("a", "b"), 1.0, 0.8))
    assert not any(pair.conflicts for pair in analysis.pairs) and analysis.conflict_share == 0.0


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e30), (torch.float32, 1e-30), (torch.bfloat16, 2.0**100)])
def test_squares_of_very_large_and_very_small_gradients_are_exact(dtype: torch.dtype, size: float) -> None:
    w = parameter(1.0, 1.0, dtype=dtype)
    analysis = of({"a": (w * torch.tensor([3 * size, 4 * size], dtype=dtype)).sum(), "b": -size * w[0]}, {"w": [w]})
    assert analysis.total_norms == pytest.approx({"a": 5 * size, "b": size})
    assert analysis.pairs[0].cosine == pytest.approx(-3 / 5)


# Against a reference, and what it leaves alone


def network(seed: int, num_tasks: int, dtype: torch.dtype) -> tuple[nn.Sequential, dict[str, Tensor]]:
    torch.manual_seed(seed)
    trunk = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)
    features = trunk(torch.randn(6, 5, dtype=dtype))
    return trunk, {
        f"t{i}": (nn.Linear(3, 2).to(dtype)(features) - torch.randn(6, 2).to(dtype)).square().mean()
        for i in range(num_tasks)
    }


@settings(max_examples=25, derandomize=True)
@given(seed=st.integers(0, 10**6), num_tasks=st.integers(1, 4))
def test_it_agrees_with_a_reference_in_float64(seed: int, num_tasks: int) -> None:
    trunk, losses = network(seed, num_tasks, torch.float64)
    groups = trunk_groups(trunk)
    analysis = of(losses, groups)
    assert [*analysis.groups] == ["00 0", "01 2", "02 4"]
    flat: dict[str, Tensor] = {}
    for task, loss in losses.items():
        trunk.zero_grad()
        loss.backward(retain_graph=True)
        for group, parameters in groups.items():
            norm = torch.cat([p.grad.flatten() for p in parameters]).norm()  # type: ignore[union-attr]
            assert analysis.norms[task][group] == pytest.approx(float(norm), rel=1e-9)
        flat[task] = torch.cat([p.grad.flatten().clone() for p in trunk.parameters()])  # type: ignore[union-attr]
        assert analysis.total_norms[task] == pytest.approx(float(flat[task].norm()), rel=1e-9)
    assert len(analysis.pairs) == num_tasks * (num_tasks - 1) // 2
    for pair in analysis.pairs:
        a, b = (flat[task] for task in pair.tasks)
        cosine = float(nn.functional.cosine_similarity(a, b, dim=0, eps=0))
        assert pair.cosine == pytest.approx(cosine, rel=1e-9, abs=1e-9)
        similarity = 2 * a.norm() * b.norm() / (a.norm() ** 2 + b.norm() ** 2)
        assert pair.magnitude_similarity == pytest.approx(float(similarity), rel=1e-9)
        assert -1 <= pair.cosine <= 1 and 0 <= pair.magnitude_similarity <= 1


@settings(max_examples=25, derandomize=True)
@given(seed=st.integers(0, 10**6), num_tasks=st.integers(1, 4))
def test_a_row_can_be_read_again(seed: int, num_tasks: int) -> None:
    trunk, losses = network(seed, num_tasks, torch.float32)
    analysis = of(losses, trunk_groups(trunk))
    row = json.loads(json.dumps(without_nan({"step": 3, "phase": "p", **analysis.to_row()})))
    assert GradientAnalysis.from_row(row) == analysis


def test_a_row_with_null_is_read_as_nan() -> None:
    w, v = parameter(1.0), parameter(1.0)
    analysis = of({"bad": math.inf * w[0], "a": w[0], "none": torch.tensor(1.0)}, {"w": [w], "v": [v]})
    again = GradientAnalysis.from_row(without_nan(analysis.to_row()))
    assert again.groups == ("w",), "a group that no task reaches leaves its number only"
    assert again.reached == analysis.reached and math.isnan(again.norms["bad"]["w"])
    assert [pair.tasks for pair in again.pairs] == [pair.tasks for pair in analysis.pairs]


def test_grad_is_left_alone_and_the_real_backward_has_the_same_bits() -> None:
    trunk, losses = network(1, 3, torch.float32)
    no_side_effects, same = network(1, 3, torch.float32)
    last = next(reversed(list(trunk.parameters())))
    last.grad = torch.full_like(last, 7.0)
    analyse(losses, trunk_groups(trunk))
    assert [p.grad is None for p in trunk.parameters()] == [True] * 5 + [False]
    assert torch.equal(last.grad, torch.full_like(last, 7.0))
    last.grad = None
    torch.stack([*losses.values()]).sum().backward()
    torch.stack([*same.values()]).sum().backward()
    for a, b in zip(trunk.parameters(), no_side_effects.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad)


def test_the_groups_of_a_trunk_are_numbered_by_depth_and_only_those_that_train_remain(tmp_path: Path) -> None:
    trunk = tiny_parts(tmp_path).model.trunk
    every = trunk_groups(trunk)
    assert sorted(every) == [*every] and next(iter(every)) == "00 conv1"
    assert [p for group in every.values() for p in group] == [*trunk.parameters()]
    trunk.get_submodule("conv1").requires_grad_(False)
    trunk.get_submodule("bn1").requires_grad_(False)
    assert [*trunk_groups(trunk)] == [*every][1:], "numbers do not move"
    assert trunk_groups(trunk.requires_grad_(False)) == {}


# In a run


def analyses(run_dir: Path) -> list[tuple[int, int, str]]:
    return [(row["step"], row["epoch"], row["phase"]) for row in read_metrics(run_dir) if "grad/unreached" in row]


def bits(parts: RunSetup) -> dict[str, bytes]:
    return {name: tensor.contiguous().numpy().tobytes() for name, tensor in parts.root.state_dict().items()}


def test_a_run_is_analysed_at_its_cadence_and_ends_with_the_same_bits_as_one_without(tmp_path: Path) -> None:
    phases = [
        {"name": "heads", "freeze": ["trunk"], "steps": 2},
        {"name": "all", "steps": 7},
        {"name": "depth", "tasks": ["depth"], "steps": 1},
    ]
    common = ("optim.accumulate=2", "data.num_train=32", "data.num_val=8")
    watched = tiny_parts(tmp_path, "name=on", "audit.gradients_every_steps=3", *common, phases=phases)
    report = train(watched, quiet=True).report
    # Two steps an epoch, each of two batches; of the frozen trunk there is nothing to say.
    assert analyses(tmp_path / "runs/on") == [(3, 2, "all"), (6, 3, "all"), (9, 5, "all"), (10, 6, "depth")]
    steps = [row["step"] for row in read_metrics(tmp_path / "runs/on")]
    assert steps == sorted(steps) and report.ok
    plain = tiny_parts(tmp_path, "name=off", "audit.gradients_every_steps=0", *common, phases=phases)
    train(plain, quiet=True)
    assert analyses(tmp_path / "runs/off") == []
    assert bits(watched) == bits(plain)


def test_a_run_shows_rows_table_and_picture_in_wandb(tmp_path: Path) -> None:
    parts = tiny_parts(
        tmp_path,
        "audit.gradients_every_steps=2",
        phases=[{"name": "finetune", "freeze": ["trunk.conv1", "trunk.bn1"], "steps": 4}],
        tracking={"mode": "offline", "log_every_steps": 4},
    )
    run_dir = train(parts, quiet=True).run_dir
    rows = {row["_step"]: row for row in wandb_file.history(wandb_file.offline_file(run_dir))}
    assert [*rows] == [0, 1, 2, 3, 4], "none was dropped"
    # An analysis is logged with the steps before it: of these, wandb gets the last one.
    assert [step for step, row in rows.items() if "train/loss" in row] == [2, 4]
    for row in (row for row in read_metrics(run_dir) if "grad/unreached" in row):
        shown = rows[row["step"]]
        # The numbers stay in metrics.jsonl: charts of a few points each would bury all others.
        assert shown["grad/conflict_share"] == row["grad/conflict_share"]
        names = {key.split("/")[1] for key in shown if key.startswith("grad/")}
        assert names == {"conflict_share", "norms"}
        assert len([key for key in row if key.startswith("grad/")]) > 20
        assert shown["grad/norms/_type"] == "table-file"
        (media,) = run_dir.glob("wandb/offline-run-*/files")
        content = json.loads((media / shown["grad/norms/path"]).read_text())
        assert content["columns"] == ["task", "group", "norm"]
        assert content["data"][0][:2] == ["segmentation", "01 layer1"]
        for task, group, norm in content["data"]:
            assert row[f"grad/norm/{task}/{group}"] == norm
    # Nothing is drawn in a step: the end of the epoch shows the latest analysis.
    assert [step for step, row in rows.items() if "grad/heat_map/path" in row] == [4]
    assert rows[4]["grad/heat_map/_type"] == "image-file"
    assert (media / rows[4]["grad/heat_map/path"]).read_bytes()[:4] == b"\x89PNG"
    assert ["grad/norms/path" in row for row in rows.values()] == [False, True, False, True, False]
    assert not any(key.endswith(("00 conv1", "00 bn1")) for row in rows.values() for key in row)


def looked_at(tmp_path: Path, every_steps: int, first_step: int, steps: range) -> list[int]:
    """The steps that a log of its own looks at, each with two batches, and a group that no task reaches."""
    trunk = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    tracker = Tracker(parts_tracking(), tmp_path, "x", {})
    log = GradientLog(tracker, trunk, every_steps)
    log.enter("p", ["a"], first_step)
    for step in steps:
        for _ in range(2):
            log.before_backward({"a": trunk[0](torch.ones(1)).sum()}, step, StepLog(tracker, 10, "p", 1))
    file = tmp_path / "metrics.jsonl"
    return [row["step"] for row in read_metrics(tmp_path)] if file.exists() else []


def parts_tracking() -> Any:
    from mtl.config import TrackingConfig

    return TrackingConfig()


def test_a_phase_resumed_in_its_middle_keeps_the_cadence_and_what_no_task_reaches_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert looked_at(tmp_path, every_steps=4, first_step=3, steps=range(5, 13)) == [7, 11]
    assert [(record.levelno, record.message) for record in caplog.records] == [
        (logging.WARNING, "p: no task's loss reaches 1 depth group of the trunk that train (01 1)")
    ]


def test_no_step_is_looked_at_with_a_cadence_of_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert looked_at(tmp_path, every_steps=0, first_step=1, steps=range(1, 5)) == []


@pytest.mark.parametrize("num_tasks", [1, 3])
def test_a_picture_can_be_drawn_of_anything(num_tasks: int) -> None:
    w, v = parameter(1.0), parameter(1.0)
    losses = {"none": torch.tensor(1.0), "bad": math.nan * w[0], "zero": 0 * v[0]}
    for analysis in (
        of(dict([*losses.items()][:num_tasks]), {"w": [w], "v": [v]}),
        GradientAnalysis.from_row({"grad/norm/a": 0.0, "grad/unreached": 2}),
    ):
        assert png_of(draw_gradients(analysis))[:4] == b"\x89PNG"
    words = [text.get_text() for axes in draw_gradients(of(losses, {"w": [w]})).axes for text in axes.texts]
    assert words[:3] == ["-", "nan", "-"]
