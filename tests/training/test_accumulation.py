"""Accumulation, clipping, averages and recomputing give the weights that a large batch, or a plain run, gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl.data import Batch, windows
from mtl.phases.resolve import Phase
from mtl.training.loop import Trainer
from mtl.training.phase import ActivePhase
from mtl.training.run import train
from mtl.training.setup import RunSetup
from mtl.training.tracking.tracker import Tracker
from runs import TINY, hide_labels, read_metrics, read_model, tiny_parts

# No layer looks at more than one image: BatchNorm of the heads is frozen, so that it is in eval mode.
APART = "type:BatchNorm2d"
PHASES: list[dict[str, Any]] = [
    {"name": "frozen", "freeze": ["trunk", APART], "epochs": 1},
    {"name": "half", "freeze": ["trunk@first:50%", APART], "epochs": 2, "lr_schedule": "cosine"},
    {"name": "all", "freeze": ["heads.object", APART], "steps": 3},
]
SETTINGS: dict[str, Any] = {
    "trunk": {"name": "test_vit"},
    # Rounding of the gradient is not blown up by a division by its own size, as in Adam.
    "optim": {"optimizer": {"name": "sgd", "options": {"momentum": 0.9}}, "lr": 0.02, "clip_norm": 0.5},
    "cache": "off",
    "phases": PHASES,
}


@pytest.fixture(autouse=True)
def _without_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")


def in_float64(parts: RunSetup, patch: pytest.MonkeyPatch) -> None:
    """Lets the model and its losses be computed in float64; only what weighs a class is still float32."""
    parts.root.double()
    patch.setattr(Tensor, "float", Tensor.double)


def as_one_batch(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """Windows as the trainer makes them, each of one large batch."""
    for window in windows(batches, size):
        yield [window[0].split.batch(torch.cat([batch.indices for batch in window]))]


def trained(folder: Path, name: str, *overrides: str, patch: pytest.MonkeyPatch, **changes: Any) -> Path:
    parts = tiny_parts(folder, f"name={name}", *overrides, **{**SETTINGS, **changes})
    hide_labels(parts)
    in_float64(parts, patch)
    result = train(parts, quiet=True)
    assert result.report.ok
    return result.run_dir


def furthest(one: Path, other: Path) -> float:
    """How far two runs' weights are from each other."""
    tensors = [read_model(run_dir / "checkpoints/last") for run_dir in (one, other)]
    assert tensors[0].keys() == tensors[1].keys()
    moved = [tensors[0][name] for name in tensors[0] if tensors[0][name].is_floating_point()]
    assert {tensor.dtype for tensor in moved} == {torch.float64}
    return max(float((tensors[0][name].double() - tensors[1][name].double()).abs().max()) for name in tensors[0])


# Five batches an epoch: windows of 2, 2 and 1, or of 3 and 2.
@pytest.mark.parametrize(
    ("accumulate", "ema_decay"), [(2, 0.9), pytest.param(3, None, marks=pytest.mark.slow)], ids=["2 ema", "3"]
)
def test_accumulated_steps_give_the_weights_of_large_batches_across_phases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int, ema_decay: float | None
) -> None:
    optim = {**SETTINGS["optim"], "accumulate": accumulate} | ({"ema_decay": ema_decay} if ema_decay else {})
    parts = trained(tmp_path, "parts", patch=monkeypatch, optim=optim)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mtl.training.loop.windows", as_one_batch)
        whole = trained(tmp_path, "whole", patch=monkeypatch, optim=optim)
    assert furthest(parts, whole) < 1e-6
    rows = [[row for row in read_metrics(run_dir) if "train/loss" in row] for run_dir in (parts, whole)]
    assert any(row["train/grad_norm"] > 0.5 for row in rows[0]), "some steps are clipped"
    for one, other in zip(*rows, strict=True):
        assert one["step"] == other["step"]
        assert one["train/grad_norm"] == pytest.approx(other["train/grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_accumulation_of_a_configuration_gives_the_weights_of_the_batch_of_that_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = TINY["data"] | {"num_train": 48}
    ends = [
        trained(tmp_path, f"by-{each}", patch=monkeypatch, data=data | {"batch_size": 48 // 3 // each}, optim=optim)
        for each, optim in ((n, SETTINGS["optim"] | {"accumulate": n}) for n in (1, 2, 4))
    ]
    assert furthest(ends[0], ends[1]) < 1e-6 and furthest(ends[0], ends[2]) < 1e-6


MIXED: dict[str, Any] = {
    # Few images: on a CPU, convolutions of fp16 are slow.
    "data": TINY["data"] | {"num_train": 20, "num_val": 8, "batch_size": 4},
    "trunk": {"name": "test_resnet", "options": {"drop_path_rate": 0.2}},
    "optim": {"ema_decay": 0.9, "accumulate": 2, "clip_norm": 1.0},
    "phases": [
        {"name": "frozen", "freeze": ["trunk"], "epochs": 2},
        {"name": "half", "freeze": ["trunk@first:50%"], "epochs": 2},
        {"name": "all", "freeze": ["heads.object"], "steps": 2},
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_computing_again_or_keeping_features_changes_no_bit(tmp_path: Path, precision: str) -> None:
    ends = {}
    for name, overrides in {
        "plain": ["cache=off"],
        "again": ["cache=off", "trunk.checkpointing=true"],
        "kept": ["cache=ram", "trunk.checkpointing=true"],
    }.items():
        parts = tiny_parts(tmp_path, f"name={name}", f"precision={precision}", *overrides, **MIXED)
        result = train(parts, quiet=True)
        assert result.report.ok
        ends[name] = {n: t.numpy().tobytes() for n, t in read_model(result.run_dir / "checkpoints/last").items()}
    assert ends["plain"] == ends["again"] == ends["kept"]


@pytest.mark.slow
def test_averages_are_those_of_a_loop_by_hand_over_phases_that_freeze_and_thaw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = tiny_parts(tmp_path, "precision=bf16", **MIXED)
    trainer = Trainer(parts, tmp_path, Tracker(parts.config.tracking, tmp_path, "x", {}), quiet=True)
    parameters = dict(parts.root.named_parameters())
    by_hand: dict[str, Tensor] = {}
    real_active, real_after = trainer.active, trainer.audit.after_step

    @contextmanager
    def watched(phase: Phase) -> Iterator[ActivePhase]:
        trains = {*phase.freeze.plan.names.trainable}
        frozen = {name: by_hand.pop(name) for name in [*by_hand] if name not in trains}
        with real_active(phase) as active:
            for name, average in frozen.items():
                torch.testing.assert_close(parameters[name].double(), average, rtol=1e-5, atol=1e-7)
            by_hand.update({name: parameters[name].detach().double() for name in trains if name not in by_hand})
            yield active

    def after() -> None:
        for name, average in by_hand.items():
            by_hand[name] = 0.9 * average + 0.1 * parameters[name].detach().double()
        real_after()

    monkeypatch.setattr(trainer, "active", watched)
    monkeypatch.setattr(trainer.audit, "after_step", after)
    assert trainer.run().report.ok
    kept = read_model(tmp_path / "checkpoints/last")
    assert by_hand.keys() == {*parts.phases[-1].freeze.plan.names.trainable}
    for name, average in by_hand.items():
        torch.testing.assert_close(kept[name].double(), average, rtol=1e-5, atol=1e-7)
        assert not torch.equal(kept[name], parameters[name]), f"{name}: the average is not the weight"
