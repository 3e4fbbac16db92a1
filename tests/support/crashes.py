"""Runs that end in the middle of a step, resume, and are compared to the bit with one that never stopped."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

import mtl.training.loop
from mtl.config import load_config
from mtl.training.resume import resumed_config
from mtl.training.run import train
from mtl.training.run_dir import check_run_dir
from mtl.training.setup import assemble
from runs import TWO, exact_metrics, read_model, tiny_config, tiny_parts

# The same in short: kept features, accumulation, an average, a phase that ends inside an epoch.
SHORT: dict[str, Any] = {
    "tasks": TWO,
    "trunk": {"name": "test_resnet", "options": {"drop_path_rate": 0.2}},
    "optim": {"ema_decay": 0.9, "accumulate": 2},
    "checkpoint": {"every_steps": 2},
    "phases": [
        {"name": "a", "freeze": ["trunk"], "epochs": 2, "cache": "ram", "balance": "famo"},
        {"name": "b", "freeze": ["trunk@first:1"], "steps": 5, "lr": 1e-3},
        {"name": "c", "evaluate_only": True},
    ],
}


def results(run_dir: Path) -> tuple[dict[str, bytes], list[dict[str, Any]], dict[str, Any]]:
    """All that a run came to: the bytes of its weights, its metrics without speeds, and its audit."""
    weights = {name: tensor.numpy().tobytes() for name, tensor in read_model(run_dir / "checkpoints/last").items()}
    rows = exact_metrics(run_dir)
    return weights, rows, json.loads((run_dir / "audit.json").read_text())


def assert_same(one: Path, other: Path) -> None:
    (weights, rows, audit), (weights_2, rows_2, audit_2) = results(one), results(other)
    assert rows == rows_2
    assert audit == audit_2
    assert weights.keys() == weights_2.keys()
    assert [name for name in weights if weights[name] != weights_2[name]] == []


def run_whole(folder: Path, cache_dir: Path, settings: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTL_CACHE_DIR", str(cache_dir))
        patch.setenv("WANDB_MODE", "offline")
        return train(tiny_parts(folder, **settings), quiet=True).run_dir


class Crash(Exception):  # noqa: N818
    """Stands for the end of a process; what is on disk is as it was."""


def crash_in_step(patch: pytest.MonkeyPatch, number: int) -> None:
    """Ends the run between the backward and the step of its n-th optimizer step."""
    real = mtl.training.loop.GradientAudit.after_backward
    left = [number]

    def after_backward(audit: Any) -> None:
        real(audit)
        left[0] -= 1
        if left[0] == 0:
            raise Crash

    patch.setattr(mtl.training.loop.GradientAudit, "after_backward", after_backward)


_CRASHED: dict[tuple[int, str | None], Path] = {}


def crashed(folder: Path, step: int, *overrides: str, **changes: Any) -> Path:
    """The run directory of a run that ended in a step; of `SHORT` as it is, a copy of the first one that did so."""
    if overrides or changes:
        return crash(folder, step, *overrides, **changes)
    of = (step, os.environ.get("WANDB_MODE"))
    if of not in _CRASHED:
        place = Path(tempfile.mkdtemp(prefix="crashed-"))
        atexit.register(shutil.rmtree, place, ignore_errors=True)
        crash(place, step)
        _CRASHED[of] = place
    tiny_config(folder, **SHORT)
    shutil.copytree(_CRASHED[of] / "runs", folder / "runs", symlinks=True)
    return folder / "runs/tiny"


def crash(folder: Path, step: int, *overrides: str, **changes: Any) -> Path:
    parts = tiny_parts(folder, *overrides, **{**SHORT, **changes})
    with pytest.MonkeyPatch.context() as patch:
        crash_in_step(patch, step)
        with pytest.raises(Crash):
            train(parts, quiet=True)
    return parts.config.run_dir


def resume(folder: Path, *overrides: str, **changes: Any) -> Path:
    """As the command line does: resolves the configuration, and resumes."""
    config = load_config(tiny_config(folder, **{**SHORT, **changes}), ["resume=auto", *overrides])
    check_run_dir(config)
    config, source = resumed_config(config)
    return train(assemble(config, quiet=True), quiet=True, source=source).run_dir
