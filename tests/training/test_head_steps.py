"""Steps of heads in a row: each run is compared with one that takes every step by itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crashes import SHORT, Crash, assert_same, resume, run_whole
from mtl.config import load_config
from mtl.data.dataset import Rows
from mtl.data.generated.stored_split import StoredSplit
from mtl.phases.conditions import AnyOf, Spent
from mtl.phases.phase_length import PhaseLength
from mtl.phases.plan import make_plan
from mtl.phases.scheduler import TaskScheduler
from mtl.phases.setup import build_meta_setup
from mtl.runtime.tensors import byte_view
from mtl.training.head_steps import HeadSteps
from mtl.training.run import train
from mtl.training.step import StepLosses
from runs import exact_metrics, read_memory, read_model, tiny_config, tiny_parts

# 24 steps an epoch: some before the audit's first look, two blocks, and a rest.
DATA = {"name": "scenes", "image_size": 32, "batch_size": 8, "num_train": 192, "num_val": 16}
HEADS: dict[str, Any] = {"name": "heads", "freeze": ["trunk"], "epochs": 2}
VECTORS = {
    "object": {"type": "classification", "num_classes": 10},
    "again": {"type": "classification", "num_classes": 10, "label": "object", "head": {"name": "mlp"}},
}


LINEAR = {
    "object": {"type": "classification", "num_classes": 10, "head": {"name": "linear"}},
    "again": {"type": "classification", "num_classes": 10, "label": "object", "head": {"name": "linear"}},
    "third": {"type": "classification", "num_classes": 10, "label": "object", "head": {"name": "mlp"}},
}


DENSE = {"depth": {"type": "depth"}, "object": VECTORS["object"]}
StoredSplit_rows = StoredSplit.rows
UNTIL = {"until": {"any": [{"steps": 17}, {"epochs": 9}]}, "max_epochs": 9}


def trained(folder: Path, **changes: Any) -> tuple[dict[str, Any], list[int]]:
    """All that a run leaves that does not depend on time, and the lengths of its rows of steps."""
    lengths = list[int]()
    call = HeadSteps.__call__

    def counted(self: HeadSteps, active: Any, optim: Any, batches: Any) -> None:
        lengths.append(len(batches))
        call(self, active, optim, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeadSteps, "__call__", counted)
        settings = {"data": DATA, "tasks": VECTORS, "phases": [HEADS], "cache": {"mode": "ram"}}
        parts = tiny_parts(folder, **settings | changes)
        train(parts, quiet=True)
    run = folder / "runs/tiny"
    rows = exact_metrics(run)
    last = run / "checkpoints/last"
    audit = json.loads((run / "audit.json").read_text())
    tensors = read_model(last) | {f"memory {name}": tensor for name, tensor in read_memory(last).items()}
    return {"rows": rows, "audit": audit, "tensors": tensors}, lengths


def is_promised(folder: Path, **changes: Any) -> bool:
    """Whether `mtl plan` says so of a phase."""
    settings = {"data": DATA, "tasks": VECTORS, "phases": [HEADS], "cache": {"mode": "ram"}}
    plan = make_plan(build_meta_setup(load_config(tiny_config(folder, **settings | changes))), with_forecast=True)
    return any(phase.kept is not None and phase.kept.in_a_row for phase in plan.phases)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optim": {"clip_norm": 0.1, "lr_schedule": {"name": "cosine", "warmup_steps": 5}}},
        {"optim": {"optimizer": {"name": "sgd", "options": {"momentum": 0.9, "nesterov": True}}, "lr": 0.1}},
        {"optim": {"optimizer": {"name": "adafactor"}, "lr": {"heads": 0.01, "heads.again": 0.001, "balance": 0.1}}},
        {"balance": {"method": "dwa"}},
        {"balance": {"method": "fixed", "weights": {"object": 0.3, "again": 2.0}}, "precision": "bf16"},
        {"phases": [HEADS | {"freeze": ["trunk", "heads.object"], "tasks": ["again"]}]},
        {"phases": [{"name": "heads", "freeze": ["trunk"], "steps": 31}, {**HEADS, "name": "more", "epochs": 1}]},
        {"phases": [{"name": "heads", "freeze": ["trunk"], **UNTIL}]},
        {"checkpoint": {"every_steps": 7}},
        {"data": DATA | {"augment": {"brightness": 0.2, "contrast": 0.2}}, "cache": {"mode": "ram", "views": 2}},
        {"tasks": VECTORS | {"depth": {"type": "depth"}}},
        {"data": DATA | {"memory_gb": 0}},
        {"tasks": LINEAR, "join_heads": True},
        {"tasks": LINEAR, "join_heads": True, "phases": [HEADS | {"freeze": ["trunk", "heads.again"]}]},
    ],
    ids=lambda changes: "-".join(changes) or "default",
)
def test_steps_in_a_row_end_with_the_bits_of_steps_by_themselves(changes: dict[str, Any], tmp_path: Path) -> None:
    for name in ("row", "plain"):
        (tmp_path / name).mkdir()
    found, lengths = trained(tmp_path / "row", **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeadSteps, "num_possible", lambda *_: 0)
        plain, none = trained(tmp_path / "plain", **changes)
    assert sum(lengths) >= 10 and not none and is_promised(tmp_path, **changes)
    assert found["rows"] == plain["rows"] and found["audit"] == plain["audit"]
    assert found["tensors"].keys() == plain["tensors"].keys()
    for name, tensor in plain["tensors"].items():
        assert torch.equal(byte_view(found["tensors"][name]), byte_view(tensor)), name


def test_the_audit_still_looks_at_the_first_steps_and_at_every_twentieth(tmp_path: Path) -> None:
    _, lengths = trained(tmp_path)
    # After step 3 to step 19, after 20 to the epoch's end at 24, from there to 39, and after 40 to 48.
    assert lengths == [16, 4, 15, 8]


@pytest.mark.parametrize(
    "changes",
    [
        {"optim": {"accumulate": 2}},
        {"optim": {"ema_decay": 0.9}},
        {"not_finite": "skip"},
        {"balance": {"method": "famo"}},
        {"balance": {"method": "random"}},
        {"balance": {"method": "pcgrad"}},
        {"phases": [HEADS | {"freeze": ["trunk.conv1"]}]},
        {"cache": "off"},
        {"checkpoint": {"every_steps": 2}},
        {"data": DATA | {"num_train": 64, "image_size": 96, "batch_size": 32}, "tasks": DENSE},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_where_something_happens_between_steps_each_is_taken_by_itself(changes: dict[str, Any], tmp_path: Path) -> None:
    data = DATA | {"num_train": 64}
    _, lengths = trained(tmp_path, **{"data": data, "phases": [HEADS | {"epochs": 1}]} | changes)
    assert lengths == [] and not is_promised(tmp_path, **{"data": data} | changes)


def test_a_batch_that_lacks_a_label_takes_its_step_by_itself(tmp_path: Path) -> None:
    found = {}
    for name in ("row", "plain"):
        (tmp_path / name).mkdir()
        with pytest.MonkeyPatch.context() as patch:
            # Labels of one task are missing in the last fifth of the images: batches of them alone are rare.
            patch.setattr(StoredSplit, "rows", lacking_rows)
            if name == "plain":
                patch.setattr(HeadSteps, "num_possible", lambda *_: 0)
            found[name], lengths = trained(tmp_path / name, data=DATA | {"memory_gb": 0, "batch_size": 2})
            assert bool(lengths) == (name == "row")
    assert found["row"]["rows"] == found["plain"]["rows"]
    assert any("train/loss/again" not in row for row in found["row"]["rows"] if "train/loss" in row)
    assert any("train/loss/again" in row for row in found["row"]["rows"] if "train/loss" in row)


def lacking_rows(self: StoredSplit, indices: torch.Tensor, with_images: bool, view: Any = None) -> Rows:
    rows = StoredSplit_rows(self, indices, with_images, view)
    return replace(rows, lacking=frozenset({"again"} if bool((indices >= 150).all()) else ()))


def test_what_is_not_finite_in_a_row_ends_the_run_and_names_the_step(tmp_path: Path) -> None:
    parts = tiny_parts(tmp_path, "cache.mode=ram", data=DATA, tasks=VECTORS, phases=[HEADS])
    loss, calls = parts.tasks["again"].loss, list[int]()

    def infinite(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return loss(output, label) * (float("inf") if len(calls) == 11 else 1.0)

    parts.tasks["again"].loss = infinite  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match="train/loss/again is inf at step 11"):
        train(parts, quiet=True)


@given(
    done=st.integers(0, 30),
    most=st.integers(0, 40),
    steps=st.integers(1, 50),
    spent=st.integers(1, 50),
)
def test_steps_that_are_left_end_no_phase_and_one_more_does(done: int, most: int, steps: int, spent: int) -> None:
    def scheduler() -> TaskScheduler:
        until = AnyOf((Spent(spent, "steps"), Spent(3, "epochs")))
        return TaskScheduler([PhaseLength("a", until=until, max_steps=steps), PhaseLength("b", steps=1)])

    one = scheduler()
    for _ in range(done):
        if one.step_done() is not None:
            return
    left = one.steps_left(most)
    assert left == min(most, min(steps, spent) - done - 1)
    if left:
        assert one.step_done(left) is None
    if left < most:
        assert one.step_done() is not None


@pytest.mark.parametrize("number", [15, 37])
def test_a_run_that_ends_in_a_row_resumes_to_the_same_bits(number: int, tmp_path: Path, cache_dir: Path) -> None:
    settings = {**SHORT, "data": DATA, "tasks": VECTORS, "phases": [HEADS], "checkpoint": {"every_steps": 10}}
    whole = run_whole(tmp_path / "whole", cache_dir, settings)
    each_loss, left = StepLosses.each_loss, [number]

    def ended(self: StepLosses, *args: Any) -> list[torch.Tensor]:
        left[0] -= 1
        if not left[0]:
            raise Crash
        return each_loss(self, *args)

    (tmp_path / "cut").mkdir()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        patch.setattr(StepLosses, "each_loss", ended)
        train(tiny_parts(tmp_path / "cut", **settings), quiet=True)
    assert_same(resume(tmp_path / "cut", **settings), whole)
