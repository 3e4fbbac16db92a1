"""Losses and gradients that are NaN or infinite: what is said, what is saved, and that nothing else moves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mtl.training.loop
import mtl.training.nonfinite
from mtl.checkpoint.load import load_checkpoint
from mtl.checkpoint.nested import split
from mtl.cli import main
from mtl.config import ConfigError, load_config
from mtl.data import training_batches
from mtl.phases.resolve import Phase
from mtl.runtime.fingerprint import fingerprint
from mtl.runtime.signals import Stopped
from mtl.training.loop import Trainer
from mtl.training.nonfinite import NotFiniteError
from mtl.training.phase import ActivePhase
from mtl.training.run import train
from mtl.training.setup import RunSetup, assemble
from mtl.training.step import StepLosses
from mtl.training.tracking.tracker import Tracker
from runs import TINY, read_metrics, read_model, tiny_config, tiny_parts

IMAGE = 17
ALL_THAT_MOVES: dict[str, Any] = {
    "tasks": {name: TINY["tasks"][name] for name in ("normals", "object")},
    "trunk": {"name": "test_resnet", "options": {"drop_path_rate": 0.2}},
    "optim": {"ema_decay": 0.9, "accumulate": 2, "clip_norm": 1.0},
    "phases": [{"name": "a", "freeze": ["trunk.conv1"], "epochs": 2}],
}


def plant(parts: RunSetup, image: int = IMAGE) -> None:
    """A label of one image that the squares of float32 cannot hold."""
    labels = parts.train.labels["normals"] = parts.train.labels["normals"].float()
    labels[image, :, 0, 0] = 1e30


def indices_of(parts: RunSetup, size: int, image: int = IMAGE) -> tuple[int, list[int]]:
    """The step of the first pass in which an image comes, from 1, and the images of that step."""
    (phase,) = {phase.name: phase for phase in parts.phases[:1]}.values()
    batches = training_batches(parts.train, phase.batch_size, parts.config.seed, 0)
    steps = iter(lambda: [index for batch in islice(batches, size) for index in batch.indices.tolist()], [])
    return next((number, found) for number, found in enumerate(steps, start=1) if image in found)


class Moments:
    """What stands before and after every step of a run, as fingerprints."""

    def __init__(self, patch: pytest.MonkeyPatch, parts: RunSetup, folder: Path) -> None:
        self.parts = parts
        self.before: list[dict[str, str]] = []
        self.after: list[dict[str, str]] = []
        self.trainer = Trainer(parts, folder, Tracker(parts.config.tracking, folder, "x", {}), quiet=True)
        real_active, real_before = self.trainer.active, mtl.training.nonfinite.StepGuard.before
        real_after = mtl.training.loop.GradientAudit.after_step

        @contextmanager
        def watched(phase: Phase) -> Iterator[ActivePhase]:
            with real_active(phase) as active:
                self.optim = active.optim
                yield active

        def before(guard: Any) -> None:
            self.before.append(self.now())
            real_before(guard)

        def after(audit: Any) -> None:
            self.after.append(self.now())
            real_after(audit)

        patch.setattr(self.trainer, "active", watched)
        patch.setattr(mtl.training.nonfinite.StepGuard, "before", before)
        patch.setattr(mtl.training.loop.GradientAudit, "after_step", after)

    def now(self) -> dict[str, str]:
        assert self.optim is not None
        ema, optimizer = self.trainer.state.ema, self.optim.optimizer
        tensors, rest = split(
            {
                "model": dict(self.parts.root.state_dict()),
                "moments": {str(n): state for n, state in enumerate(optimizer.state.values())},
                "ema": {} if ema is None else ema.averages(),
                "balance": {"memory": self.parts.phases[0].balance.state()},
                "random": {"torch": torch.get_rng_state()},
            }
        )
        return {name: fingerprint(tensor) for name, tensor in tensors.items()} | {"rest": json.dumps(rest)}


@pytest.fixture(autouse=True)
def _without_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")


@pytest.mark.parametrize("method", ["uw", "dwa", "famo", "mean", "random"])
def test_a_skipped_step_leaves_every_bit_as_if_it_had_not_been_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    parts = tiny_parts(tmp_path, "not_finite=skip", balance={"method": method}, **ALL_THAT_MOVES)
    plant(parts)
    seen = Moments(monkeypatch, parts, tmp_path)
    seen.trainer.run()
    step, _ = indices_of(parts, 2)
    same = [one == other for one, other in zip(seen.before, seen.after, strict=True)]
    assert len(same) == 6 and not same[step % 3]
    bad = [number for number, is_same in enumerate(same, start=1) if is_same]
    assert bad[0] == step and len(bad) == 2, "once in each pass"
    assert all(torch.isfinite(tensor).all() for tensor in parts.root.state_dict().values())
    assert seen.trainer.audit.report.ok
    rows = read_metrics(tmp_path)
    assert [row["train/skipped_steps"] for row in rows if "val/score" in row] == [1, 2]
    assert [row["step"] for row in rows if "train/loss" in row] == [n for n in range(1, 7) if n not in bad]
    state = json.loads((tmp_path / "checkpoints/last/state.json").read_text())
    assert (state["step"], state["num_skipped"]) == (6, 2)


class Overflow(torch.autograd.Function):
    """Passes on what it is given, and sends an infinite gradient back."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.view_as(x)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * torch.inf


def overflow_in_pass(parts: RunSetup, number: int) -> None:
    """Lets the gradient of one forward in train mode be infinite; its losses are finite."""
    left = [number]

    def hook(_module: Any, _inputs: Any, output: Tensor) -> Tensor | None:
        left[0] -= torch.is_grad_enabled()
        if left[0] or not torch.is_grad_enabled():
            return None
        left[0] -= 1
        found: Tensor = Overflow.apply(output)  # type: ignore[no-untyped-call]
        return found

    parts.model.heads["normals"].register_forward_hook(hook)


def test_an_infinite_gradient_of_a_finite_loss_is_skipped_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = tiny_parts(tmp_path, "not_finite=skip", balance={"method": "famo"}, **ALL_THAT_MOVES)
    # In the second batch of the second step; FAMO asks for one more forward a step, without a gradient.
    overflow_in_pass(parts, 4)
    seen = Moments(monkeypatch, parts, tmp_path)
    seen.trainer.run()
    same = [one == other for one, other in zip(seen.before, seen.after, strict=True)]
    assert same == [False, True, False, False, False, False]


def test_raising_names_task_step_and_images_and_the_checkpoint_is_from_before(tmp_path: Path) -> None:
    parts = tiny_parts(tmp_path, "optim.accumulate=2", "checkpoint.every_steps=1", phases=[{"name": "a", "epochs": 2}])
    image = next(i for i in range(40) if indices_of(parts, 2, i)[0] == 3)
    step, images = indices_of(parts, 2, image)
    plant(parts, image)
    with pytest.raises(NotFiniteError, match=r"train/loss/normals is inf at step 3 of phase 'a'"):
        train(parts, quiet=True)
    run_dir = tmp_path / "runs/tiny"
    said = json.loads((run_dir / "not_finite.json").read_text())
    assert said == {"what": "train/loss/normals", "step": step, "epoch": 1, "indices": images}
    assert json.loads((run_dir / "checkpoints/last/state.json").read_text())["step"] == 2
    assert all(torch.isfinite(tensor).all() for tensor in read_model(run_dir / "checkpoints/last").values())


def test_an_infinite_gradient_raises_with_its_norm(tmp_path: Path) -> None:
    parts = tiny_parts(tmp_path, phases=[{"name": "a", "epochs": 1}])
    overflow_in_pass(parts, 3)
    with pytest.raises(NotFiniteError, match=r"train/grad_norm is (inf|nan) at step 3 of phase 'a'"):
        train(parts, quiet=True)


def run(folder: Path, *overrides: str, is_planted: bool = False, **changes: Any) -> Path:
    parts = assemble(load_config(tiny_config(folder, **changes), overrides), quiet=True)
    if is_planted:
        plant(parts)
    return train(parts, quiet=True).run_dir


def bits(run_dir: Path) -> dict[str, str]:
    return {name: fingerprint(tensor) for name, tensor in read_model(run_dir / "checkpoints/last").items()}


def test_a_run_that_stopped_resumes_to_the_bits_of_one_without_the_bad_label(tmp_path: Path) -> None:
    changes = {**ALL_THAT_MOVES, "balance": {"method": "famo"}}
    clean = run(tmp_path, "name=clean", "not_finite=stop", **changes)
    with pytest.raises(Stopped, match=r"train/loss/normals is inf at step \d of phase 'a', .*; saved as it was"):
        run(tmp_path, "not_finite=stop", is_planted=True, **changes)
    audit = json.loads((tmp_path / "runs/tiny/audit.json").read_text())
    assert not audit["ok"] and not audit["phases"][0]["completed"] and audit["phases"][0]["violations"] == []
    with pytest.raises(ConfigError, match=r"edited since the run began \(labels of normals, train\); resume_override"):
        run(tmp_path, "not_finite=stop", "resume=auto", **changes)
    again = run(tmp_path, "not_finite=stop", "resume=auto", "resume_override=true", **changes)
    assert bits(again) == bits(clean)
    ended, whole = (json.loads((run_dir / "audit.json").read_text()) for run_dir in (again, clean))
    assert ended["ok"] and ended == whole


def test_a_run_that_ended_so_resumes_under_another_policy(tmp_path: Path) -> None:
    phases = [{"name": "a", "epochs": 2}]
    skipped = run(tmp_path, "name=skipped", "not_finite=skip", is_planted=True, phases=phases)
    with pytest.raises(Stopped):
        run(tmp_path, "not_finite=stop", is_planted=True, phases=phases)
    again = run(tmp_path, "not_finite=skip", "resume=auto", is_planted=True, phases=phases)
    assert bits(again) == bits(skipped)
    assert read_metrics(again)[-1]["train/skipped_steps"] == 2


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every run that is assembled has the bad label."""
    real = assemble

    def assemble_with_it(*arguments: Any, **options: Any) -> RunSetup:
        parts = real(*arguments, **options)
        plant(parts)
        return parts

    monkeypatch.setattr("mtl.training.setup.assemble", assemble_with_it)
    yield


@pytest.mark.usefixtures("planted")
@pytest.mark.parametrize(("policy", "saved"), [("raise", "Nothing was saved yet."), ("stop", "resume=auto")])
def test_the_command_ends_with_1_and_says_what_and_how_to_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], policy: str, saved: str
) -> None:
    assert main(["train", str(tiny_config(tmp_path)), "-q", f"not_finite={policy}"]) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said and saved in said and "of phase 'warm-heads'" in said
    images = json.loads((tmp_path / "runs/tiny/not_finite.json").read_text())["indices"]
    assert IMAGE in images


# Half precision


HALF: dict[str, Any] = {
    # Few images: on a CPU, convolutions of fp16 are slow.
    "data": TINY["data"] | {"num_train": 20, "num_val": 8, "batch_size": 4},
    "balance": {"method": "mean"},
    "phases": [{"name": "a", "epochs": 2}, {"name": "b", "steps": 3}],
}


@pytest.mark.slow
def test_a_step_that_overflows_in_fp16_is_left_to_the_scaler_and_counted(tmp_path: Path) -> None:
    parts = tiny_parts(tmp_path, "precision=fp16", **HALF)
    overflow_in_pass(parts, 2)
    trainer = Trainer(parts, tmp_path, Tracker(parts.config.tracking, tmp_path, "x", {}), quiet=True)
    steps: list[str] = []
    name = "heads.depth.out.bias"
    real = trainer.audit.after_step

    def note() -> None:
        steps.append(fingerprint(parts.root.get_parameter(name)))
        real()

    trainer.audit.after_step = note  # type: ignore[method-assign]
    assert trainer.run().report.ok
    assert steps[1] == steps[0] and len(set(steps)) == len(steps) - 1
    rows = [row for row in read_metrics(tmp_path) if "val/score" in row]
    assert [row["train/skipped_steps"] for row in rows] == [1, 1, 1]
    assert trainer.scaler.get_scale() == 2.0**15


def test_a_loss_that_is_nan_after_a_step_spoils_no_balancing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, number = StepLosses.without_graph, iter(range(100))

    def infinite_once(objective: StepLosses, *arguments: Any) -> Any:
        losses = real(objective, *arguments)
        return losses * torch.inf if next(number) == 1 else losses

    monkeypatch.setattr(StepLosses, "without_graph", infinite_once)
    phases = [{"name": "a", "freeze": ["trunk"], "steps": 4}]
    parts = tiny_parts(tmp_path, "balance=famo", "not_finite=skip", phases=phases)
    result = train(parts, quiet=True)
    assert next(number) == 4
    assert read_metrics(result.run_dir)[-1]["train/skipped_steps"] == 0
    assert all(bool(p.isfinite().all()) for p in parts.root.get_submodule("balance").parameters())


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_run_in_half_precision_resumes_to_the_same_bits(tmp_path: Path, precision: str) -> None:
    settings = (f"precision={precision}", "checkpoint.every_steps=1", "optim.accumulate=2")
    whole = tiny_parts(tmp_path, "name=whole", *settings, **HALF)
    if precision == "fp16":
        overflow_in_pass(whole, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mtl.checkpoint.folder.Checkpoints._prune", lambda _: None)
        run_dir = train(whole, quiet=True).run_dir
    # Inside the second epoch, and after it.
    for step in (4, 6):
        source = f"resume={run_dir}/checkpoints/step-{step:08d}"
        again = train(tiny_parts(tmp_path, f"name=at-{step}", source, *settings, **HALF), quiet=True).run_dir
        assert bits(again) == bits(run_dir)
        ends = [json.loads((folder / "checkpoints/last/state.json").read_text()) for folder in (run_dir, again)]
        assert ends[0]["num_skipped"] == ends[1]["num_skipped"] == (precision == "fp16")
        scalers = [load_checkpoint(folder / "checkpoints/last", whole.root)[1]["scaler"] for folder in (run_dir, again)]
        assert scalers[0] == scalers[1] and scalers[0].get("scale", 2.0**15) == 2.0**15
