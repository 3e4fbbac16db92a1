"""Runs on a table: read batch by batch or in memory, resumed, with views of which features are kept, and edited."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from crashes import SHORT, assert_same, crash, results, resume, run_whole
from mtl.cli import main
from mtl.config import load_config
from mtl.training.setup import assemble
from runs import tiny_config

FLIPS: dict[str, Any] = {"train": ["random_resized_crop", "flip"]}
TASKS = {"kind": {"type": "classification"}, "parts": {"type": "segmentation", "num_classes": 3}}
PHASES = [{"name": "a", "freeze": ["trunk"], "epochs": 3}, {"name": "b", "freeze": ["trunk.conv1"], "steps": 5}]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """24 pictures of several sizes with masks, some classes and some masks missing."""
    rng = np.random.default_rng(0)
    rows = [["image", "kind", "parts", "split"]]
    for number in range(24):
        size = (30 + number, 40 - number // 2)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
        Image.fromarray(rng.integers(0, 3, size, dtype=np.uint8)).save(tmp_path / f"{number}-parts.png")
        kind = "" if number % 7 == 0 else ("jay", "owl", "wren")[number % 3]
        parts = "" if number % 5 == 0 else f"{number}-parts.png"
        rows.append([f"{number}.png", kind, parts, "val" if number >= 16 else "train"])
    with (tmp_path / "birds.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return tmp_path


def settings(table: Path, **data: Any) -> dict[str, Any]:
    own = {"name": "table", "train": str(table / "birds.csv"), "split": {"by": "column"}, "image_size": [32, 40]}
    return {"data": {**own, "batch_size": 4, **data}, "tasks": TASKS, "phases": PHASES, "balance": "uw"}


def whole(table: Path, name: str, **changes: Any) -> Path:
    return run_whole(table / name, table / "cache", SHORT | settings(table) | changes)


def test_data_read_batch_by_batch_trains_the_same_bits_as_data_in_memory(table: Path) -> None:
    phases = {"phases": [{**PHASES[0], "epochs": 2}, {**PHASES[1], "steps": 2}]}
    memory = whole(table, "memory", **phases)
    for name, data in (("files", {"memory_gb": 0.0}), ("workers", {"memory_gb": 0.0, "num_workers": 2})):
        assert_same(memory, whole(table, name, **settings(table, **data) | phases))


@pytest.mark.parametrize("cache", [{}, {"views": 2}], ids=["computed", "two views kept"])
def test_a_crashed_run_with_random_transforms_resumes_to_the_same_bits(
    table: Path, cache: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = settings(table, transform=FLIPS) | {"cache": cache}
    before = whole(table, "whole", **changes)
    monkeypatch.setenv("MTL_CACHE_DIR", str(table / "cache"))
    (table / "crashed").mkdir()
    crash(table / "crashed", 7, **changes)
    assert_same(before, resume(table / "crashed", **changes))


def test_views_that_are_kept_are_those_that_would_be_computed(table: Path) -> None:
    changes = settings(table, transform=FLIPS) | {"phases": PHASES[:1]}
    kept = whole(table, "kept", **changes, cache={"views": 2})
    computed = whole(table, "computed", **changes, cache={"views": 2, "mode": "off"})
    assert results(kept)[:2] == results(computed)[:2]


def test_edited_labels_and_images_are_noticed_when_a_run_resumes(
    table: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = settings(table, memory_gb=0.0)
    monkeypatch.setenv("MTL_CACHE_DIR", str(table / "cache"))
    (table / "run").mkdir()
    crash(table / "run", 7, **changes)
    record = json.loads((table / "run/runs/tiny/data.json").read_text())
    assert record["classes"] == {"kind": ["jay", "owl", "wren"]} and record["images"] == {"train": 16, "val": 8}
    csv_file = table / "birds.csv"
    csv_file.write_text(csv_file.read_text().replace("1.png,owl", "1.png,jay", 1))
    Image.new("RGB", (39, 33)).save(table / "3.png")
    file = table / "run/tiny.yaml"
    assert main(["train", str(file), "-q", "resume=auto"]) == 2
    said = capsys.readouterr().err
    assert "the data was edited since the run began (images, train, labels of kind, train); resume_over" in said
    assert main(["train", str(file), "-q", "resume=auto", "resume_override=true"]) == 0
    assert "warning: resume: the data was edited since the run began" in capsys.readouterr().out


def test_the_number_and_names_of_classes_are_those_of_the_table(table: Path) -> None:
    setup = assemble(load_config(tiny_config(table, **settings(table))), quiet=True)
    assert setup.tasks["kind"].num_outputs == 3 and setup.model.heads["kind"].out.out_features == 3
    assert setup.tasks["kind"].caption(setup.train.labels_to_fit("kind")[:4].long(), is_label=True) == [
        *("none", "owl", "wren", "jay")
    ]
