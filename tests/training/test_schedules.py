"""Whole schedules, trained: what phases hand over to each other, go back to, and leave alone."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import mtl.training.loop
import mtl.training.validator
from mtl.checkpoint.files import state_digest
from mtl.config import load_config
from mtl.config.yaml_source import ConfigError
from mtl.phases.resolve import Phase
from mtl.training.loop import Trainer
from mtl.training.phase import ActivePhase, PhaseOptimizer
from mtl.training.result import RunResult
from mtl.training.run import train
from mtl.training.setup import RunSetup
from mtl.training.state import RunState
from mtl.training.tracking.tracker import Tracker
from runs import TINY, read_metrics, read_model, small_parts, tiny_config

ALL = ["segmentation", "depth", "normals", "object"]


def tensors(parts: RunSetup) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in parts.root.state_dict().items()}


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes()


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not same_bits(before[name], after[name])}


def parts_with(folder: Path, phases: list[dict[str, Any]], *overrides: str, **changes: Any) -> RunSetup:
    return small_parts(folder, *overrides, phases=phases, **changes)


def trainer_of(parts: RunSetup, folder: Path) -> Trainer:
    return Trainer(parts, folder, Tracker(parts.config.tracking, folder, "x", {}), quiet=True)


def scripted_scores(monkeypatch: pytest.MonkeyPatch, scores: Iterable[float]) -> None:
    """Lets each validation come to a score of the script's; all else is as it is."""
    script = iter(scores)
    monkeypatch.setattr(mtl.training.validator, "score", lambda *_: next(script))


class Watcher:
    """Notes what stands at each phase's first and at every step."""

    def __init__(self, trainer: Trainer) -> None:
        self.entries: list[dict[str, Tensor]] = []
        self.optims: list[PhaseOptimizer] = []
        self.first_lr: list[list[float]] = []
        self._trainer = trainer
        real = trainer.active

        @contextmanager
        def watched(phase: Phase) -> Iterator[ActivePhase]:
            with real(phase) as active:
                if active.optim is not None:
                    self.entries.append(tensors(trainer.setup))
                    self.optims.append(active.optim)
                    self.first_lr.append([group["lr"] for group in active.optim.optimizer.param_groups])
                yield active

        trainer.active = watched  # type: ignore[method-assign]


# --- plateaus, best weights, going back


PLATEAUS = [
    {"name": "a", "freeze": ["trunk"], "until": {"plateau": "val/score", "patience": 2}, "max_epochs": 6},
    {
        "name": "b",
        "freeze": ["trunk@first:50%"],
        "until": {"plateau": "val/score", "patience": 1},
        "max_epochs": 6,
        "restore": "best",
    },
    {"name": "c", "until": {"plateau": "val/score", "patience": 2}, "max_epochs": 2, "restore": "best"},
    {"name": "d", "until": {"plateau": "val/score", "patience": 1}, "max_epochs": 5, "restore": "best"},
]


@pytest.mark.slow
def test_a_plateau_trace_over_four_phases_goes_back_to_the_best_weights_at_each_transition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mtl")
    parts = parts_with(
        tmp_path, PLATEAUS, data={"name": "scenes", "image_size": 32, "batch_size": 20, "num_train": 40, "num_val": 20}
    )
    # Two steps an epoch. a: best at epoch 2 (0.5), a tie is none; b: 0.4 is its own first best, 0.3 a plateau; c ends
    # with its limit; d: patience counts from 0 again.
    script = [0.3, 0.5, 0.5, 0.4, 0.4, 0.3, 0.6, 0.5, 0.55, 0.5]
    scripted_scores(monkeypatch, script)
    trainer = trainer_of(parts, tmp_path)
    watcher = Watcher(trainer)
    saved: dict[int, dict[str, Tensor]] = {}
    real: Callable[..., Path] = trainer.checkpoints.write

    def note(state: RunState, *arguments: Any) -> Path:
        saved[state.step] = tensors(parts)
        return real(state, *arguments)

    trainer.checkpoints.write = note  # type: ignore[method-assign]
    ended = trainer.run()

    reasons = [line for line in caplog.messages if "; next phase" in line or line.startswith("d: plateau")]
    assert reasons == [
        "a: plateau of val/score for 2 epochs; next phase: b",
        "b: plateau of val/score for 1 epoch; next phase: c",
        "c: 2 epochs done, the limit; next phase: d",
        "d: plateau of val/score for 1 epoch",
    ]
    assert [line for line in caplog.messages if "back to" in line] == [
        "b: back to the weights of step 4, the best by val/score: 0.5",
        "c: back to the weights of step 4, the best by val/score: 0.5",
        "d: back to the weights of step 14, the best by val/score: 0.6",
    ]
    # Weights and buffers of every part rewind, to the bit, BatchNorm statistics among them.
    for entry, step in zip(watcher.entries[1:], (4, 4, 14), strict=True):
        assert not moved(entry, saved[step])
    assert any("running_mean" in name for name in moved(saved[8], watcher.entries[1]))
    # The rate does not rewind: every phase begins its own schedule at its own start.
    assert all(lrs == pytest.approx([4e-5] * len(lrs)) for lrs in watcher.first_lr)
    assert (ended.best_score, ended.best_step) == (0.6, 14)
    assert ended.report.ok and trainer.state.step == 20


def test_moments_go_back_with_the_weights_unless_the_phase_resets_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases = [
        {"name": "a", "epochs": 3},
        {"name": "b", "steps": 1, "restore": "best"},
        {"name": "c", "steps": 1, "restore": "best", "optimizer_state": "reset"},
    ]
    parts = parts_with(tmp_path, phases)
    scripted_scores(monkeypatch, [0.5, 0.9, 0.1, 0.2, 0.3])
    trainer = trainer_of(parts, tmp_path)
    watcher = Watcher(trainer)
    trainer.run()
    stem = parts.root.get_parameter("trunk.conv1.0.weight")
    steps = [int(stepping.optimizer.state[stem]["step"]) for stepping in watcher.optims]
    assert steps == [15, 10 + 1, 1]


def test_best_by_a_named_metric_and_direction_is_kept_next_to_the_best_score(tmp_path: Path) -> None:
    phases = [
        {"name": "a", "epochs": 2},
        {"name": "b", "steps": 1, "restore": {"which": "best", "metric": "val/depth/rmse"}},
    ]
    parts = parts_with(tmp_path, phases)
    ended = train(parts, quiet=True)
    rows = [row for row in read_metrics(ended.run_dir) if "val/score" in row]
    lowest = min(rows, key=lambda row: row["val/depth/rmse"])
    state = json.loads((ended.run_dir / "checkpoints/best-lower-val-depth-rmse/state.json").read_text())
    assert state["step"] == lowest["step"] and state["val/depth/rmse"] == lowest["val/depth/rmse"]


def test_going_back_before_there_is_a_best_continues_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    parts = parts_with(tmp_path, [{"name": "a", "steps": 1}, {"name": "b", "steps": 1, "restore": "best"}])
    scripted_scores(monkeypatch, [math.nan, 0.1])
    ended = train(parts, quiet=True)
    assert "b: there are no best weights by val/score yet; keeping the current ones" in caplog.messages
    assert ended.best_step == 2


def test_a_metric_that_is_nan_never_counts_as_best_nor_against_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    parts = parts_with(tmp_path, [{"name": "a", "epochs": 4}])
    scripted_scores(monkeypatch, [math.nan, 0.2, math.nan, 0.1])
    ended = train(parts, quiet=True)
    assert (ended.best_score, ended.best_step) == (0.2, 10)
    assert sum("does not count as best" in line for line in caplog.messages) == 2


# --- taking a run up


SCHEDULE = [
    {"name": "a", "freeze": ["trunk"], "epochs": 2},
    {"name": "b", "freeze": ["heads"], "epochs": 2, "optimizer": {"name": "sgd", "options": {"momentum": 0.9}}},
    {"name": "c", "epochs": 2, "lr_schedule": {"name": "plateau", "patience": 1}, "restore": "best"},
]


def keep_every_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtl.checkpoint.folder.Checkpoints._prune", lambda _: None)


@pytest.mark.slow
def test_a_run_resumed_from_any_checkpoint_in_any_phase_ends_with_the_bits_of_one_that_never_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_every_checkpoint(monkeypatch)
    scores = [0.1, 0.5, 0.4, 0.3, 0.6, 0.2]
    scripted_scores(monkeypatch, scores)
    whole = parts_with(tmp_path, SCHEDULE)
    first = train(whole, quiet=True)
    expected = tensors(whole)
    folders = sorted((first.run_dir / "checkpoints").glob("step-*"))
    assert [folder.name for folder in folders] == [f"step-{step:08d}" for step in (5, 10, 15, 20, 25, 30)]
    for done, folder in enumerate(folders[:-1], start=1):
        scripted_scores(monkeypatch, scores[done:])
        parts = parts_with(tmp_path, SCHEDULE, f"name=again-{done}", f"resume={folder}", "seed=0")
        ended = train(parts, quiet=True)
        assert not moved(expected, tensors(parts)), folder.name
        assert ended.report.ok and (ended.best_score, ended.best_step) == (0.6, 25)
        assert [row["step"] for row in read_metrics(ended.run_dir) if "val/score" in row] == [
            5 * number for number in range(done + 1, 7)
        ]
        last = json.loads((ended.run_dir / "audit.json").read_text())["phases"]
        assert [phase["name"] for phase in last] == ["a", "b", "c"], "the phases before are proven as well"


@pytest.mark.parametrize("link", ["best", "last"])
def test_a_run_resumed_holds_every_parameter_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link: str) -> None:
    scripted_scores(monkeypatch, [0.1, 0.5, 0.4])
    first = parts_with(tmp_path, [*SCHEDULE[:1], {"name": "b", "epochs": 1}])
    run_dir = train(first, quiet=True).run_dir
    scripted_scores(monkeypatch, [0.2] * 9)
    phases = [*SCHEDULE[:1], {"name": "b", "epochs": 1 if link == "best" else 2}]
    source = (f"resume={run_dir}/checkpoints/{link}", "resume_override=true")
    parts = parts_with(tmp_path, phases, "name=again", *source)
    if link == "last":
        with pytest.raises(ConfigError, match="is the end of its run: no phase is left"):
            train(parts, quiet=True)
        assert not (tmp_path / "runs/again").exists()
        return
    held: list[int] = []
    real = mtl.training.loop.GradientAudit.after_step

    def note(audit: Any) -> None:
        held.extend(len(group["params"]) for optimizer in audit._optimizers for group in optimizer.param_groups)
        real(audit)

    monkeypatch.setattr(mtl.training.loop.GradientAudit, "after_step", note)
    train(parts, quiet=True)
    assert sum(held) == 5 * len(list(parts.root.parameters()))


def test_what_cannot_be_resumed_is_said_before_anything_is_written(tmp_path: Path) -> None:
    run_dir = train(parts_with(tmp_path, [{"name": "a", "epochs": 1}, {"name": "b", "epochs": 1}]), quiet=True).run_dir
    last = run_dir / "checkpoints/last"
    two = [{"name": "a", "epochs": 1}, {"name": "b", "epochs": 1}]
    for phases, source, changes, message in [
        (two, tmp_path / "nowhere", {}, r"resume: there is no .*nowhere"),
        (
            two[:1],
            last,
            {},
            r"phases \(order\): \['a', 'b'\] -> \['a'\]; .*resume_override=true resumes with the new one",
        ),
        (two[:1], last, {"resume_override": True}, r"is of a run with the phases a, b; this one has a"),
        (
            two,
            last,
            {"trunk": {"name": "test_vit"}},
            r"trunk\.name: test_resnet -> test_vit; a run cannot resume with another value",
        ),
        (two, last, {}, r"is the end of its run"),
    ]:
        parts = parts_with(tmp_path, phases, "name=again", f"resume={source}", **changes)
        with pytest.raises(ConfigError, match=message):
            train(parts, quiet=True)
        assert not (tmp_path / "runs/again").exists()


# --- who trains, with what


def test_optimizer_rate_schedule_and_decay_may_change_from_phase_to_phase(tmp_path: Path) -> None:
    phases = [
        {"name": "a", "steps": 2, "optimizer": "sgd", "lr": 0.05, "lr_schedule": "constant", "weight_decay": 0},
        {"name": "b", "steps": 2, "lr": {"trunk": 1e-3, "heads": 2e-3}, "weight_decay": {"trunk": 0.1, "heads": 0.2}},
        {"name": "c", "steps": 2, "optimizer": {"name": "adam", "options": {"betas": [0.8, 0.9]}}},
    ]
    parts = parts_with(tmp_path, phases, "optim.lr=3e-3", "optim.lr_schedule=cosine")
    trainer = trainer_of(parts, tmp_path)
    watcher = Watcher(trainer)
    assert trainer.run().report.ok
    kinds = [type(stepping.optimizer).__name__ for stepping in watcher.optims]
    assert kinds == ["SGD", "AdamW", "Adam"]
    groups = [{(group["lr"], group["weight_decay"]) for group in phase.groups} for phase in parts.phases]
    # The balancing method's weights have the run's rate; vectors have no decay; what a phase does not say is the run's.
    assert groups == [
        {(0.05, 0.0)},
        {(1e-3, 0.1), (1e-3, 0.0), (2e-3, 0.2), (2e-3, 0.0), (3e-3, 0.0)},
        {(3e-3, 0.05), (3e-3, 0.0)},
    ]
    rates = [row["train/lr"] for row in read_metrics(tmp_path) if "train/lr" in row]
    assert rates == pytest.approx([0.05, 0.05, 3e-3, 1.5e-3, 3e-3, 1.5e-3])
    held = [id(p) for stepping in watcher.optims for group in stepping.optimizer.param_groups for p in group["params"]]
    assert len(held) == 3 * len(set(held))
    assert watcher.optims[2].optimizer.param_groups[0]["betas"] == (0.8, 0.9)


def test_repeated_phases_take_turns_and_each_continues_with_its_own_moments(tmp_path: Path) -> None:
    turns = [{"name": "heads", "freeze": ["trunk"], "steps": 2}, {"name": "trunk", "freeze": ["heads"], "steps": 3}]
    parts = parts_with(tmp_path, [{"repeat": 2, "phases": turns}], balance={"method": "mean"})
    trainer = trainer_of(parts, tmp_path)
    watcher = Watcher(trainer)
    ended = trainer.run()
    assert [*ended.scores] == ["heads.1", "trunk.1", "heads.2", "trunk.2"]
    counts = [{int(state["step"]) for state in stepping.optimizer.state.values()} for stepping in watcher.optims[2:]]
    assert counts == [{2 + 2}, {3 + 3}]
    assert [len(group["params"]) for group in watcher.optims[0].optimizer.param_groups] == [
        len(group["params"]) for group in watcher.optims[2].optimizer.param_groups
    ]
    # While a part rests, neither its weights nor its statistics move.
    after_first, after_second = watcher.entries[1], watcher.entries[2]
    assert all(name.startswith("trunk.") for name in moved(after_first, after_second))
    assert any("running_mean" in name for name in moved(after_first, after_second))


def test_state_parked_for_no_later_phase_is_dropped(tmp_path: Path) -> None:
    phases = [{"name": "a", "steps": 1}, {"name": "b", "freeze": ["trunk"], "steps": 1}]
    parts = parts_with(tmp_path, phases)
    trainer = trainer_of(parts, tmp_path)
    trainer.run()
    (moments,) = trainer.state.optimizer_state.state_dict().values()
    assert moments and not any(name.startswith("trunk.") for name in moments)


def test_only_active_tasks_are_run_and_what_they_do_not_reach_rests(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mtl")
    phases = [{"name": "all", "steps": 2}, {"name": "depth", "steps": 3, "tasks": ["depth"]}]
    parts = parts_with(tmp_path, phases, tasks=TINY["tasks"])
    trainer = trainer_of(parts, tmp_path)
    watcher = Watcher(trainer)
    ran: list[str] = []
    for name, head in parts.model.heads.items():
        head.register_forward_hook(lambda *_, name=name: ran.append(name) if torch.is_grad_enabled() else None)
    ended = trainer.run()
    assert ended.report.ok
    assert [ran.count(task) for task in ALL] == [2, 5, 2, 2]
    others = ("heads.segmentation.", "heads.normals.", "heads.object.", "balance.0.", "normalize.")
    changed = moved(watcher.entries[1], tensors(parts))
    assert changed and not any(name.startswith(others) for name in changed)
    assert "depth: no active task reaches" in "\n".join(caplog.messages)
    rows = [row for row in read_metrics(tmp_path) if row["phase"] == "depth" and "train/loss" in row]
    assert all({key for key in row if key.startswith("train/loss/")} == {"train/loss/depth"} for row in rows)
    # Every task is still judged.
    assert {*ended.scores["depth"]} == {*ALL}


def test_unreached_parameters_are_frozen_by_default_warned_of_or_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dense: dict[str, Any] = {
        "trunk": {"name": "tf_efficientnet_lite0"},
        "tasks": {"depth": {"type": "depth"}},
        "balance": {"method": "mean"},
        "data": {"name": "scenes", "image_size": 32, "batch_size": 4, "num_train": 8, "num_val": 4},
    }
    phases = [{"name": "a", "steps": 1}]
    names = ["trunk.conv_head.weight", "trunk.bn2.weight", "trunk.bn2.bias"]
    frozen = parts_with(tmp_path, phases, **dense)
    assert list(frozen.phases[0].freeze.unreached) == names
    ended = train(frozen, quiet=True)
    assert {*names} <= {*ended.report.phases[0].fingerprints} and ended.report.ok
    assert ended.report.phases[0].num_trained == ended.report.phases[0].num_trainable

    warned = parts_with(tmp_path, phases, "name=warned", "unreached=warn", **dense)
    ended = train(warned, quiet=True)
    assert ended.report.ok and "trunk.conv_head.weight" not in ended.report.phases[0].fingerprints
    assert any(r.levelno == logging.WARNING and "NOT frozen" in r.message for r in caplog.records)

    with pytest.raises(ConfigError, match=r"phases\.a: phase 'a' would train 3 tensors that no active task reaches"):
        parts_with(tmp_path, phases, "unreached=error", **dense)


def test_freeze_always_holds_in_every_phase_against_any_take_back(tmp_path: Path) -> None:
    phases = [
        {"name": "a", "freeze": ["heads", "trunk.layer4", "!trunk", "!heads.depth"], "steps": 1},
        {"name": "b", "train": ["trunk"], "steps": 2},
    ]
    parts = parts_with(tmp_path, phases, freeze_always=["trunk", "!trunk.layer4"])
    before = tensors(parts)
    ended = train(parts, quiet=True)
    changed = moved(before, tensors(parts))
    assert ended.report.ok
    assert {name.split(".")[1] for name in changed if name.startswith("trunk.")} == {"layer4"}


def test_a_batch_of_one_image_trains_where_every_norm_is_frozen(tmp_path: Path) -> None:
    parts = parts_with(tmp_path, [{"name": "a", "freeze": ["type:BatchNorm2d"], "steps": 2, "batch_size": 1}])
    before = tensors(parts)
    assert train(parts, quiet=True).report.ok
    changed = moved(before, tensors(parts))
    assert {name.split(".")[0] for name in changed} >= {"trunk", "heads"}
    assert not any("bn" in name for name in changed)


def test_batch_size_and_balancing_method_may_change_from_phase_to_phase(tmp_path: Path) -> None:
    phases = [
        {
            "name": "a",
            "epochs": 1,
            "batch_size": 20,
            "balance": {"method": "fixed", "weights": dict.fromkeys(ALL, 2.0)},
        },
        {"name": "b", "epochs": 1, "batch_size": 10, "tasks": ["depth", "normals"]},
    ]
    parts = parts_with(tmp_path, phases, tasks=TINY["tasks"])
    assert [phase.num_steps for phase in parts.phases] == [2, 4]
    before = tensors(parts)
    train(parts, quiet=True)
    rows = [row for row in read_metrics(tmp_path / "runs/tiny") if "train/loss" in row]
    for row in rows[:2]:
        assert row["train/loss"] == pytest.approx(2 * sum(row[f"train/loss/{task}"] for task in ALL), rel=1e-5)
    learned = {name for name in moved(before, tensors(parts)) if name.startswith("balance.")}
    assert learned == {"balance.1.scalarizer.log_var"}
    assert parts.root.get_parameter("balance.1.scalarizer.log_var").shape == (2,)


# --- boundaries


def test_a_phase_that_only_evaluates_is_validated_once_and_proves_every_byte(tmp_path: Path) -> None:
    phases = [
        {"name": "before", "evaluate_only": True},
        {"name": "train", "steps": 3},
        {"name": "after", "evaluate_only": True, "restore": "best"},
    ]
    parts = parts_with(tmp_path, phases)
    start = tensors(parts)
    trainer = trainer_of(parts, tmp_path)
    watcher = Watcher(trainer)
    ended = trainer.run()
    assert [*ended.scores] == ["before", "train", "after"]
    assert not moved(start, watcher.entries[0])
    rows = [(row["step"], row["epoch"], row["phase"]) for row in read_metrics(tmp_path) if "val/score" in row]
    assert rows == [(0, 0, "before"), (3, 1, "train"), (3, 1, "after")]
    best = max(
        ended.scores, key=lambda name: mtl.training.validator.score(parts.tasks, ended.scores[name], parts.trivial)
    )
    assert ended.scores["after"] == ended.scores[best if best != "after" else "train"]
    report = trainer.audit.report
    assert report.ok and [phase.num_steps for phase in report.phases] == [0, 3, 0]
    every_tensor = {*dict(parts.root.named_parameters()), *dict(parts.root.named_buffers())}
    assert {*report.phases[0].fingerprints} == every_tensor


def test_everything_frozen_is_refused_unless_the_phase_says_that_it_only_evaluates(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"phases\.a\.freeze: phase 'a' trains nothing: .*evaluate_only: true"):
        parts_with(tmp_path, [{"name": "a", "freeze": ["**"], "steps": 1}])


def test_an_accumulation_window_ends_with_its_phase_and_leaves_no_gradient_to_the_next(tmp_path: Path) -> None:
    # Five batches an epoch make windows of 3 and 2; the first phase ends after the first window of its second pass.
    options: dict[str, Any] = {"trunk": {"name": "test_vit"}, "balance": {"method": "mean"}}
    phases = [{"name": "a", "freeze": ["trunk"], "steps": 3}, {"name": "b", "steps": 1}]
    parts = parts_with(tmp_path, phases, "optim.accumulate=3", **options)
    trainer = trainer_of(parts, tmp_path)
    seen: list[set[str]] = []
    real = trainer.audit.after_backward

    def note() -> None:
        seen.append({name for name, p in parts.root.named_parameters() if p.grad is not None})
        real()

    trainer.audit.after_backward = note  # type: ignore[method-assign]
    watcher = Watcher(trainer)
    ended = trainer.run()
    rows = [row for row in read_metrics(tmp_path) if "train/loss" in row]
    assert [(row["step"], row["epoch"], row["phase"]) for row in rows] == [
        (1, 1, "a"),
        (2, 1, "a"),
        (3, 2, "a"),
        (4, 3, "b"),
    ]
    heads = {name for name in seen[0] if name.startswith("heads.")}
    assert seen[:3] == [heads] * 3 and any(name.startswith("trunk.") for name in seen[3])
    assert ended.report.ok and len(watcher.optims) == 2


def test_phases_of_one_step_each_are_entered_and_left(tmp_path: Path) -> None:
    phases = [{"repeat": 3, "phases": [{"name": "h", "freeze": ["trunk"], "steps": 1}, {"name": "t", "steps": 1}]}]
    ended = train(parts_with(tmp_path, phases), quiet=True)
    assert ended.report.ok
    assert [phase.num_steps for phase in ended.report.phases] == [1] * 6
    assert all(phase.num_trained > 0 for phase in ended.report.phases)


def test_wall_time_and_a_reached_metric_end_a_phase_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mtl")
    phases = [
        {"name": "a", "until": {"wall_time_s": 1e-6}, "max_steps": 50},
        {"name": "b", "until": {"metric": "val/score", "at_least": 0.5}, "max_epochs": 5},
        {
            "name": "c",
            "until": {"all": [{"metric": "val/score", "at_least": 0.5}, {"epochs": 2}]},
            "max_epochs": 5,
        },
    ]
    parts = parts_with(tmp_path, phases)
    scripted_scores(monkeypatch, [0.1, 0.4, 0.6, 0.7, 0.8])
    ended = train(parts, quiet=True)
    ends = [line.split("; next")[0] for line in caplog.messages if line[:3] in ("a: ", "b: ", "c: ")]
    assert ends[0].startswith("a: ") and ends[0].endswith("seconds spent")
    assert ends[1:] == [
        "b: val/score reached 0.6 (mark 0.5)",
        "c: val/score reached 0.8 (mark 0.5) and 2 epochs done",
    ]
    assert [phase.num_steps for phase in ended.report.phases] == [1, 10, 10]


# --- clipping, averaging


def test_gradients_are_clipped_over_what_is_trained_alone(tmp_path: Path) -> None:
    phases = [{"name": "a", "freeze": ["trunk"], "steps": 1, "optimizer": "sgd", "lr": 1.0, "weight_decay": 0}]
    options = ("optim.lr_schedule=constant",)
    free, clipped = (
        parts_with(tmp_path, phases, *options, f"name={name}", *extra, balance={"method": "mean"})
        for name, extra in (("free", ()), ("clipped", ("optim.clip_norm=0.01",)))
    )
    deltas = []
    for parts in (free, clipped):
        before = tensors(parts)
        assert train(parts, quiet=True).report.ok
        after = tensors(parts)
        names = [name for name, _ in parts.root.named_parameters() if name.startswith("heads.")]
        deltas.append(torch.cat([(after[name] - before[name]).double().flatten() for name in names]))
    norm = deltas[0].norm()
    assert norm > 0.01 and deltas[1].norm().item() == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(deltas[1], deltas[0] * 0.01 / norm, rtol=1e-2, atol=1e-6)


def test_averaged_weights_are_judged_and_kept_and_training_resumes_from_its_own(tmp_path: Path) -> None:
    phases = [{"name": "a", "freeze": ["trunk"], "steps": 4}, {"name": "b", "steps": 3}]
    plain = parts_with(tmp_path, phases, "name=plain")
    averaged = parts_with(tmp_path, phases, "name=averaged", "optim.ema_decay=0.5")
    by_run: dict[str, list[Tensor]] = {}
    real = mtl.training.loop.GradientAudit.after_step
    name = "heads.depth.out.bias"

    outcomes: dict[str, RunResult] = {}
    for parts in (plain, averaged):
        seen = by_run.setdefault(parts.config.name, [parts.root.get_parameter(name).detach().double().clone()])
        with pytest.MonkeyPatch.context() as patch:

            def note(audit: Any, parts: RunSetup = parts, seen: list[Tensor] = seen) -> None:
                seen.append(parts.root.get_parameter(name).detach().double().clone())
                real(audit)

            patch.setattr(mtl.training.loop.GradientAudit, "after_step", note)
            outcomes[parts.config.name] = train(parts, quiet=True)
    assert not moved(tensors(plain), tensors(averaged)), "training does not see the average"
    average = by_run["averaged"][0]
    for value in by_run["averaged"][1:]:
        average = 0.5 * average + 0.5 * value
    last = outcomes["averaged"].run_dir / "checkpoints/last"
    torch.testing.assert_close(read_model(last)[name].double(), average, rtol=1e-5, atol=1e-7)
    live = load_file(last / "optimizer.safetensors")[f"live/{name}"]
    assert same_bits(live, averaged.root.get_parameter(name).detach())
    assert outcomes["averaged"].report.ok
    assert outcomes["averaged"].scores["b"] != outcomes["plain"].scores["b"]


def test_a_run_with_averages_is_resumed_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_every_checkpoint(monkeypatch)
    phases = [{"name": "a", "freeze": ["trunk"], "epochs": 2}, {"name": "b", "epochs": 1}]
    whole = parts_with(tmp_path, phases, "optim.ema_decay=0.9")
    run_dir = train(whole, quiet=True).run_dir
    for step in (5, 10):
        source = run_dir / f"checkpoints/step-{step:08d}"
        parts = parts_with(tmp_path, phases, "optim.ema_decay=0.9", f"name=from-{step}", f"resume={source}")
        again = train(parts, quiet=True).run_dir
        ends = [folder / "checkpoints/last" for folder in (run_dir, again)]
        for one, other in (
            [read_model(end) for end in ends],
            [load_file(end / "optimizer.safetensors") for end in ends],
        ):
            assert one.keys() == other.keys() and all(same_bits(one[key], other[key]) for key in one), step


def test_the_resolved_configuration_of_every_schedule_here_loads_again(tmp_path: Path) -> None:
    for phases in (PLATEAUS, SCHEDULE):
        config = load_config(tiny_config(tmp_path, phases=phases))
        assert [phase.name for phase in config.written_phases] == [phase["name"] for phase in phases]


def test_a_copy_of_a_checkpoint_that_is_its_own_best_is_resumed_with_it(tmp_path: Path) -> None:
    phases = [{"name": "a", "epochs": 1}, {"name": "b", "epochs": 1, "restore": "best"}]
    first = parts_with(tmp_path, phases, "name=first")
    with pytest.MonkeyPatch.context() as patch:
        keep_every_checkpoint(patch)
        source = train(first, quiet=True).run_dir / "checkpoints/step-00000005"
    copy = tmp_path / "mine"
    shutil.copytree(source, copy)
    again = train(parts_with(tmp_path, phases, "name=again", f"resume={copy}"), quiet=True)
    assert not moved(tensors(first), read_model(again.run_dir / "checkpoints/last"))


def test_a_checkpoint_inside_a_phase_is_not_resumed_by_one_that_freezes_other_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_every_checkpoint(monkeypatch)
    run_dir = train(parts_with(tmp_path, [{"name": "a", "epochs": 2}]), quiet=True).run_dir
    other = [{"name": "a", "epochs": 2, "freeze": ["trunk"]}]
    source = (f"resume={run_dir}/checkpoints/step-00000005", "resume_override=true")
    parts = parts_with(tmp_path, other, "name=again", *source)
    with pytest.raises(ConfigError, match=r"is inside a phase 'a' that froze other parameters than it does here"):
        train(parts, quiet=True)


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    run_dir = train(parts_with(tmp_path, [{"name": "a", "epochs": 1}]), quiet=True).run_dir
    file = run_dir / "checkpoints/last/state.json"
    state = json.loads(file.read_text())
    for key in ("scheduler", "best", "phases", "step"):
        less = {k: v for k, v in state.items() if k != key}
        file.write_text(json.dumps({**less, "digests": {**less["digests"], "state": state_digest(less)}}))
        parts = parts_with(tmp_path, [{"name": "a", "epochs": 1}], "name=again", f"resume={run_dir}/checkpoints/last")
        with pytest.raises(ConfigError, match=r"resume: .*is (damaged, or of another version|the end of its run)"):
            train(parts, quiet=True)
