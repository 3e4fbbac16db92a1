"""`mtl compare` with real processes: killed at any moment, it continues to the numbers of one that was not."""

from __future__ import annotations

import csv
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
    assert b"val/score" in out and (whole / "out/comparison.md").exists(), err.decode()
    # When the folder is made; before anything trains; inside the first two runs, of which a checkpoint is there; and
    # when two are done.
    made = broken / "out"
    for has_come in (
        made.exists,
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
    assert "s of training, in which all runs of the shortest" in (broken / "out/comparison.md").read_text()
    # More seeds train the new ones only.
    more = start(broken, "--seeds", "3", "--jobs", "2")
    more.communicate(timeout=HANGS_S)
    assert more.returncode == 0 and len(numbers(broken)) == 3 * 2
    assert {file: file.stat().st_mtime_ns for file in before} == before


@pytest.mark.slow
def test_a_setting_that_diverges_or_is_refused_is_left_out_and_named(tmp_path: Path) -> None:
    grid = ("--grid", "optim.lr=1.0e-3,1.0e+30", "--seeds", "2", "--jobs", "2")
    out, err = (process := start(tmp_path, *grid)).communicate(timeout=HANGS_S)
    assert process.returncode == 1
    assert b"error: mean-lr1.0e_30-seed0: exit code 1: train/" in err and b"is nan at step" in err, err.decode()
    assert {row["setting"] for row in numbers(tmp_path)} == {"optim.lr=1.0e-3"}
    text = (tmp_path / "out/comparison.md").read_text()
    assert "Failed, and left out with the other seeds of their settings: mean-lr1.0e_30-seed0" in text
    assert b"optim.lr=1.0e-3" in out
    # Where all diverge, there is nothing to compare.
    (tmp_path / "all").mkdir()
    lost = start(tmp_path / "all", "--set", "optim.lr=1.0e+30", "--seeds", "1", "--jobs", "2")
    _, err = lost.communicate(timeout=HANGS_S)
    assert lost.returncode == 1 and b"error: nothing to compare" in err, err.decode()
    assert not (tmp_path / "all/out/comparison.md").exists()


@pytest.mark.slow
def test_configurations_of_other_lengths_are_compared_at_equal_steps(tmp_path: Path) -> None:
    for name, epochs in (("short", 1), ("long", 3)):
        content = TINY | SMALL | {"phases": [{**PHASES[0], "epochs": epochs, "lr_schedule": "constant"}]}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    arguments = ["compare", *(str(tmp_path / f"{name}.yaml") for name in ("short", "long")), "--seeds", "1"]
    arguments += ["--out", str(tmp_path / "out")]
    steps = {}
    for equal in ([], ["--equal", "steps"]):
        assert main([*arguments, *equal]) == 0
        steps[bool(equal)] = [row["steps"] for row in numbers(tmp_path)]
    assert steps == {False: ["2", "6"], True: ["2", "2"]}
    assert len({row["val/depth/abs_rel"] for row in numbers(tmp_path)}) == 1, "one seed, and the same first epoch"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("phases.all.freeze=[trunk.layer9]", "trunk.layer9"),
        ("data.batch_size=64", "expected batches of at most the 16 training images"),
        ("trunk.name=resnet17", "resnet17"),
    ],
)
def test_what_model_or_data_refuse_is_found_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    files = [str(tmp_path / file) for file in configs(tmp_path)]
    code = main(["compare", *files, "--out", str(tmp_path / "out"), "--set", override])
    said = capsys.readouterr().err
    assert code == 2 and "mean-seed0: " in said and message in said
    assert not (tmp_path / "out").exists()


def test_wrong_arguments_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = (str(tmp_path / file) for file in configs(tmp_path))
    out = ["--out", str(tmp_path / "out")]
    for arguments, message in (
        ([one, other, *out, "--jobs", "0"], "--jobs: expected 1 or more, got 0"),
        ([one, one, *out], "two configurations have this name"),
        ([one, other, *out, "--set", "optim.lrx=1"], "optim.lrx: unknown key; nearest: lr"),
        ([one, str(tmp_path / "missing.yaml"), *out], "missing.yaml"),
        ([one, other, "--out", one], "--out: expected a folder, got the file"),
    ):
        assert main(["compare", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
