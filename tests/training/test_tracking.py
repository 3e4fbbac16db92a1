"""Tracking: metrics.jsonl always, and a real wandb offline file, read back record by record."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import forks
import wandb_file
from mtl.config import TrackingConfig
from mtl.training.tracking.tracker import Tracker
from processes import HANGS_S
from runs import small_config

ROWS = [
    {"step": 1, "epoch": 1, "phase": "warm", "train/loss": 2.5},
    {"step": 2, "epoch": 1, "phase": "warm", "train/loss": 2.0, "val/score": 0.5},
]


def test_an_offline_run_holds_configuration_rows_and_summary(tmp_path: Path) -> None:
    tracker = Tracker(TrackingConfig(project="p"), tmp_path, "name", {"seed": 3, "trunk": {"name": "resnet18"}})
    assert tracker.message.startswith("wandb: offline")
    for row in ROWS:
        tracker.log(row)
    tracker.finish({"audit/ok": True}, failed=False)
    file = wandb_file.offline_file(tmp_path)
    found = wandb_file.history(file)
    assert [{key: row[key] for key in expected} for row, expected in zip(found, ROWS, strict=True)] == ROWS
    assert [row["_step"] for row in found] == [1, 2]
    config = wandb_file.config(file)
    assert (config["seed"], config["trunk"]) == (3, {"name": "resnet18"})
    assert wandb_file.summary(file)["audit/ok"] is True


def test_a_table_and_a_picture_are_in_wandb_at_their_step_and_only_there(tmp_path: Path) -> None:
    tracker = Tracker(TrackingConfig(), tmp_path, "name", {})
    file = io.BytesIO()
    Image.new("RGB", (3, 2)).save(file, format="png")
    tracker.log(ROWS[0])
    tracker.log_table("a/table", ["x", "y"], [("p", 1.5), ("q", None), ("r", float("nan"))], step=1)
    tracker.log_picture("a/picture", file.getvalue, step=1)
    tracker.log(ROWS[1])
    tracker.finish({}, failed=False)
    first, second = wandb_file.history(wandb_file.offline_file(tmp_path))
    assert (first["a/table/nrows"], first["a/picture/width"], first["train/loss"]) == (3, 3, 2.5)
    assert not any(key.startswith("a/") for key in second)
    (folder,) = tmp_path.glob("wandb/offline-run-*/files")
    assert json.loads((folder / first["a/table/path"]).read_text())["data"][:2] == [["p", 1.5], ["q", None]]
    assert (folder / first["a/picture/path"]).is_file()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_without_wandb_no_picture_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracker = Tracker(TrackingConfig(), tmp_path, "name", {})
    tracker.log_table("table", ["x"], [[1.0]], step=1)
    tracker.log_picture("picture", lambda: pytest.fail("drawn"), step=1)
    assert not [*tmp_path.iterdir()]


def test_metrics_jsonl_has_one_object_a_line_and_null_for_what_is_not_a_number(tmp_path: Path) -> None:
    tracker = Tracker(TrackingConfig(mode="disabled"), tmp_path, "name", {})
    tracker.log({"step": 1, "val/score": float("nan"), "train/loss": float("inf"), "x": 1.5})
    tracker.log({"step": 2, "x": 2})
    tracker.finish({}, failed=False)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "val/score": None, "train/loss": None, "x": 1.5},
        {"step": 2, "x": 2},
    ]


def test_disabled_makes_no_wandb_files(tmp_path: Path) -> None:
    tracker = Tracker(TrackingConfig(mode="disabled"), tmp_path, "name", {})
    tracker.finish({}, failed=False)
    assert tracker.message == "wandb: disabled" and not (tmp_path / "wandb").exists()


@pytest.mark.parametrize(
    ("environment", "mode", "said"),
    [
        ("disabled", "auto", "wandb: disabled"),
        ("disabled", "offline", "wandb: offline (no key, or asked for)"),
        ("offline", "disabled", "wandb: disabled"),
        ("offline", "auto", "wandb: offline (no key, or asked for)"),
        ("", "offline", "wandb: offline (no key, or asked for)"),
        ("disabled", "online", "wandb: offline (wandb knows no key: wandb login)"),
    ],
)
def test_a_mode_in_words_goes_before_the_environment_and_auto_leaves_it_the_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: str, mode: Any, said: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", environment)
    monkeypatch.setenv("HOME", str(tmp_path))
    tracker = Tracker(TrackingConfig(mode=mode), tmp_path, "name", {})
    tracker.finish({}, failed=False)
    assert tracker.message.startswith(said) and tracker.is_less == (mode == "online")


def test_a_wandb_that_cannot_start_never_ends_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise RuntimeError("no room\nat all")

    monkeypatch.setattr("wandb.init", fail)
    tracker = Tracker(TrackingConfig(), tmp_path, "name", {})
    assert tracker.message == "wandb: off, since it failed (no room); the numbers are in metrics.jsonl"
    assert tracker.is_less
    tracker.log(ROWS[0])
    tracker.finish({}, failed=True)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == ROWS[0]


def test_a_wandb_that_stops_working_is_reported_once_and_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Tracker(TrackingConfig(), tmp_path, "name", {})
    real = tracker._backend._run  # type: ignore[union-attr]

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("gone")

    monkeypatch.setattr(real, "log", fail)
    for row in ROWS:
        tracker.log(row)
    tracker.finish({}, failed=False)
    real.finish()
    assert [record.message for record in caplog.records if record.name == "mtl"] == [
        "wandb: stopped, since log failed (gone); metrics.jsonl continues"
    ]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def track_in_a_process_of_its_own(folder: Path, **surroundings: str) -> str:
    """Tracks one row without WANDB_MODE and without a terminal; returns what the tracker says of wandb."""
    code = f"""
from pathlib import Path
from mtl.config import TrackingConfig
from mtl.training.tracking.tracker import Tracker

tracker = Tracker(TrackingConfig(), Path({str(folder)!r}), "name", {{}})
print(tracker.message)
tracker.log({{"step": 1, "x": 2.0}})
tracker.finish({{}}, failed=False)
"""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    environment = clean | {"HOME": str(folder)} | surroundings
    result = forks.run(["-c", code], timeout=HANGS_S, env=environment, check=True)
    assert json.loads((folder / "metrics.jsonl").read_text()) == {"step": 1, "x": 2.0}
    return result.stdout


def test_without_key_and_terminal_wandb_is_offline_and_asks_nothing(tmp_path: Path) -> None:
    said = track_in_a_process_of_its_own(tmp_path)
    assert "wandb: offline (no key, or asked for); upload later with: wandb sync" in said
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.slow
def test_a_key_without_a_server_falls_back_to_offline(tmp_path: Path) -> None:
    # An address on this machine where nothing listens.
    said = track_in_a_process_of_its_own(tmp_path, WANDB_API_KEY="0" * 40, WANDB_BASE_URL="http://127.0.0.1:9")
    assert "wandb: offline, since online failed" in said


@pytest.mark.slow
def test_a_quiet_run_warns_of_tracking_that_it_does_not_get(tmp_path: Path) -> None:
    file = small_config(tmp_path, phases=[{"name": "a", "freeze": ["trunk"], "steps": 1}])
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"HOME": str(tmp_path)}
    # An address on this machine where nothing listens.
    key = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    for surroundings, said in [
        ({"WANDB_MODE": "disabled"}, "wandb: offline (wandb knows no key: wandb login); upload later with"),
        ({"WANDB_MODE": "disabled"} | key, "wandb: offline, since online failed"),
    ]:
        name = f"name=n{len(surroundings)}"
        command = ["-m", "mtl", "train", str(file), "-q", "tracking.mode=online", name]
        done = forks.run(command, timeout=HANGS_S, env=clean | surroundings, check=True)
        assert said in done.stdout + done.stderr
