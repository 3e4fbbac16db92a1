"""`mtl compare` with real processes: killed at any moment, it continues to the numbers of one that was not."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mtl.cli import main
from processes import HANGS_S, wait_until
from runs import TINY, TWO

SMALL = {"data": {**TINY["data"], "num_train": 16, "num_val": 8}, "tasks": TWO, "tracking": {"mode": "disabled"}}
PHASES = [{"name": "all", "freeze": ["trunk@first:50%"], "epochs": 2}]


def configs(folder: Path) -> list[str]:
    for method in ("mean", "pcgrad"):
        content = TINY | SMALL | {"phases": PHASES, "balance": method, "checkpoint": {"every_steps": 1}}
        (folder / f"{method}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return ["mean.yaml", "pcgrad.yaml"]


def start(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "mtl", "compare", *configs(folder), "--out", "out", *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def numbers(folder: Path) -> list[dict[str, str]]:
    """Without speeds."""
    with (folder / "out/comparison.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in ("train_s", "images_per_s")} for row in csv.DictReader(file)]


def trainers(folder: Path) -> list[int]:
    """The processes that train below a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
            if b"train" in command and (entry / "cwd").readlink() == folder:
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_a_comparison_that_is_killed_again_and_again_ends_as_one_that_was_not(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    arguments = ("--seeds", "2", "--jobs", "2", "--stl")
    out, err = start(whole, *arguments).communicate(timeout=HANGS_S)
    assert (whole / "out/comparison.md").read_text().strip() == out.decode().strip(), err.decode()
    # Before anything trains; inside the first two runs, of which a checkpoint is there; and when two are done.
    made = broken / "out"
    for has_come in (
        lambda: (made / "comparison.json").exists(),
        lambda: len([*made.glob("runs/*/checkpoints/last")]) == 2,
        lambda: len([*made.glob("done/*")]) >= 2,
    ):
        process = start(broken, *arguments)
        wait_until(has_come)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=HANGS_S)
        # The runs end with it: none trains on in a directory that the next one resumes in.
        wait_until(lambda: trainers(broken) == [])
    _, err = (process := start(broken, *arguments)).communicate(timeout=HANGS_S)
    assert process.returncode == 0, err.decode()
    assert numbers(broken) == numbers(whole)
    assert len(numbers(whole)) == 2 * 2 + 2 * 2
    # Nothing is trained twice.
    before = {file: file.stat().st_mtime_ns for file in (broken / "out/runs").glob("*/metrics.jsonl")}
    again = start(broken, *arguments, "--equal", "time")
    again.communicate(timeout=HANGS_S)
    assert again.returncode == 0
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert "the shortest mean time of a configuration" in (broken / "out/comparison.md").read_text()


@pytest.mark.slow
def test_a_run_that_is_refused_ends_the_comparison_and_is_named(tmp_path: Path) -> None:
    files = configs(tmp_path)
    (tmp_path / "out").mkdir()
    arguments = ["compare", *(str(tmp_path / file) for file in files), "--out", str(tmp_path / "out"), "--seeds", "1"]
    assert main([*arguments, "--dry-run"]) == 0 and list((tmp_path / "out").iterdir()) == []
    code = subprocess.Popen([sys.executable, "-m", "mtl", *arguments, "--set", "data.batch_size=64"], cwd=tmp_path,
                            stderr=subprocess.PIPE)  # fmt: skip
    _, err = code.communicate(timeout=HANGS_S)
    assert code.returncode == 2 and b"expected batches of at most the 16 training images" in err
    assert b"mean-seed0: failed, exit code 2" in err
    assert json.loads((tmp_path / "out/comparison.json").read_text())["jobs"] == ["mean-seed0", "pcgrad-seed0"]


def test_wrong_arguments_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = (str(tmp_path / file) for file in configs(tmp_path))
    out = ["--out", str(tmp_path / "out")]
    for arguments, message in (
        ([one, other, *out, "--jobs", "0"], "--jobs: expected 1 or more, got 0"),
        ([one, one, *out], "two configurations have this name"),
        ([one, other, *out, "--set", "optim.lrx=1"], "optim.lrx: unknown key; nearest: lr"),
        ([one, str(tmp_path / "missing.yaml"), *out], "missing.yaml"),
    ):
        assert main(["compare", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
