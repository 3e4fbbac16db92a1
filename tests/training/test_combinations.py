"""Precision and size in combination: clean audits, exact steps, and the same bits however a run is broken off."""

from __future__ import annotations

import json
import random
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crashes import assert_same, crashed, resume
from mixes import VALUES, every_pair, in_words, settings
from mtl.checkpoint.load import load_checkpoint
from mtl.runtime.fingerprint import fingerprint
from mtl.training.loop import Trainer
from mtl.training.run import train
from mtl.training.tracking.tracker import Tracker
from runs import TINY, read_metrics, tiny_parts

ROWS = every_pair(VALUES)


def test_every_pair_of_values_meets_and_few_runs_do() -> None:
    for one, other in combinations(VALUES, 2):
        met = {(row[one], row[other]) for row in ROWS}
        assert len(met) == len(VALUES[one]) * len(VALUES[other])
    assert len(ROWS) <= 14


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(ROWS)), ids=map(in_words, ROWS))
def test_every_pair_of_settings_is_clean_and_resumes_to_the_same_bits(tmp_path: Path, number: int) -> None:
    changes = settings(ROWS[number])
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    whole = train(tiny_parts(tmp_path / "whole", **changes), quiet=True).run_dir
    audit = json.loads((whole / "audit.json").read_text())
    assert audit["ok"] and [phase["completed"] for phase in audit["phases"]] == [True, True, True]
    rows = read_metrics(whole)
    steps = max(row["step"] for row in rows)
    at = random.Random(number).randint(1, steps)
    crashed(tmp_path / "broken", at, **changes)
    assert_same(resume(tmp_path / "broken", **changes), whole)


# Half precision that overflows


OVERFLOWS: dict[str, Any] = {
    "precision": "fp16",
    "tasks": TINY["tasks"],
    "trunk": {"name": "test_vit"},  # on a CPU, convolutions of fp16 are slow
    "optim": {"ema_decay": 0.5, "accumulate": 2, "clip_norm": 1.0},
    # The scaler begins with 65536, and halves until gradients fit.
    "balance": {"method": "fixed", "weights": {"segmentation": 1e3, "depth": 1.0, "normals": 1.0, "object": 1.0}},
    "checkpoint": {"every_steps": 1},
    "phases": [{"name": "frozen", "freeze": ["trunk"], "epochs": 4}, {"name": "all", "steps": 3}],
}


class Seen:
    """Fingerprints of all that a step may move, before and after every step of a run."""

    def __init__(self, trainer: Trainer) -> None:
        self.steps: list[tuple[bool, bool, float]] = []
        self._trainer = trainer
        self._root = trainer.setup.root
        real_before, real_after = trainer.audit.after_backward, trainer.audit.after_step

        def before() -> None:
            self._weights, self._averages = self._now()
            real_before()

        def after() -> None:
            weights, averages = self._now()
            self.steps.append((weights == self._weights, averages == self._averages, trainer.scaler.get_scale()))
            real_after()

        trainer.audit.after_backward, trainer.audit.after_step = before, after  # type: ignore[method-assign]

    def _now(self) -> tuple[list[str], list[str]]:
        assert self._trainer.state.ema is not None
        tensors: list[list[Tensor]] = [
            list(self._root.parameters()),
            list(self._trainer.state.ema.averages().values()),
        ]
        return [fingerprint(each) for each in tensors[0]], [fingerprint(each) for each in tensors[1]]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_steps_that_overflow_are_counted_and_move_neither_weights_nor_averages(tmp_path: Path, optimizer: str) -> None:
    how = {"optimizer": "adamw", "lr": 1e-4}
    if optimizer == "sgd":
        how = {"optimizer": {"name": "sgd", "options": {"momentum": 0.9}}, "lr": 0.05}  # type: ignore[dict-item]
    optim = {**OVERFLOWS["optim"], **how, "lr_schedule": "constant"}
    parts = tiny_parts(tmp_path, **{**OVERFLOWS, "optim": optim})
    trainer = Trainer(parts, tmp_path, Tracker(parts.config.tracking, tmp_path, "x", {}), quiet=True)
    seen = Seen(trainer)
    result = trainer.run()
    assert result.report.ok, result.report.violations
    stood = [weights for weights, _, _ in seen.steps]
    assert stood[0] and not stood[-1], "the first step overflows, the last one does not"
    assert [averages for _, averages, _ in seen.steps] == stood
    scales = [2.0**16, *[scale for _, _, scale in seen.steps]]
    assert [now < before for before, now in pairwise(scales)] == stood
    rows = read_metrics(tmp_path)
    norms = [row["train/grad_norm"] for row in rows if "train/grad_norm" in row]
    assert [norm is None for norm in norms] == stood, "the log has every step"
    counted = [row["train/skipped_steps"] for row in rows if "val/score" in row]
    assert counted[-1] == sum(stood) and counted == sorted(counted) and counted[0] > 0
    assert all(torch.isfinite(parameter).all() for parameter in parts.root.parameters())
    assert torch.isfinite(torch.tensor([norm for norm in norms if norm is not None])).all()


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 4, 9, 13])
def test_a_run_that_overflows_continues_with_scale_and_count(tmp_path: Path, step: int) -> None:
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    whole = train(tiny_parts(tmp_path / "whole", **OVERFLOWS), quiet=True).run_dir
    crashed(tmp_path / "broken", step, **OVERFLOWS)
    again = resume(tmp_path / "broken", **OVERFLOWS)
    assert_same(again, whole)
    root = tiny_parts(tmp_path, **OVERFLOWS).root
    scales = [load_checkpoint(each / "checkpoints/last", root)[1]["scaler"] for each in (whole, again)]
    assert scales[0] == scales[1] and scales[0]["scale"] < 2.0**12
