"""Whole runs on bad days: each ends with one message that says what to do, and goes on to the bits of a good day."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import wandb_file
from crashes import SHORT, assert_same, crashed, go_on, results
from mtl.cli import main
from mtl.run import train
from processes import wait_until, workers
from runs import read_metrics, tiny_config, tiny_parts

HERE = Path(__file__).parent
# One file of a run after another may meet a full disk; nothing here takes long.
SMALL: dict[str, Any] = SHORT | {"tracking": {"mode": "disabled", "log_every_steps": 1}}


@pytest.fixture(autouse=True)
def _without_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")


def command(file: Path, *overrides: str, before: str = "") -> list[str]:
    """`mtl train`, quietly, in a process in which something is done before."""
    program = f"import sys\nfrom mtl.cli import main\n{before}\nsys.exit(main(sys.argv[1:]))"
    return [sys.executable, "-c", program, "train", str(file), "-q", *overrides]


def run(file: Path, *overrides: str, before: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(file, *overrides, before=before),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"},
    )


def ended_well(said: subprocess.CompletedProcess[str], code: int) -> str:
    """What was said by a run that ended with a code, and without a traceback."""
    assert said.returncode == code, said.stderr[-3000:]
    assert "Traceback" not in said.stderr and "Warning" not in said.stderr, said.stderr[-3000:]
    return said.stderr


def whole_run(tmp_path: Path, settings: dict[str, Any]) -> Path:
    (tmp_path / "whole").mkdir()
    return train(tiny_parts(tmp_path / "whole", **settings), quiet=True).run_dir


# --- a full disk

# Fills the disk that the run directory is on just before something is written for the n-th time.
FILL = """
import mtl.{module}
real, left = mtl.{module}.{name}, [{number}]
def fill(*arguments, **options):
    if {condition}:
        left[0] -= 1
        if left[0] == 0:
            with open({disk!r} + "/filler", "wb", buffering=0) as stream:
                for size in (4096, 1):
                    try:
                        while True:
                            stream.write(bytes(size))
                    except OSError:
                        pass
    return real(*arguments, **options)
mtl.{module}.{name} = fill
"""
MOMENTS = {
    "a checkpoint": {"module": "checkpoint.folder", "name": "Checkpoints._write", "number": 4, "condition": "True"},
    "the metrics": {"module": "tracking", "name": "Tracker.log", "number": 6, "condition": "True"},
    "the audit": {
        "module": "trainer",
        "name": "write_json",
        "number": 2,
        "condition": "str(arguments[0]).endswith('audit.json')",
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["a checkpoint", "the metrics", "the audit"])
def test_a_disk_that_fills_ends_the_run_with_a_message_and_it_goes_on_once_there_is_room(
    tmp_path: Path, small_disk: Path, moment: str
) -> None:
    whole = whole_run(tmp_path, SMALL)
    subprocess.run(["mount", "-o", "remount,size=40m", str(small_disk)], check=True)
    file = tiny_config(tmp_path, **SMALL | {"runs_dir": str(small_disk)})
    said = ended_well(run(file, before=FILL.format(disk=str(small_disk), **MOMENTS[moment])), 1)
    print(said)
    first, *_, last = said.splitlines()
    assert re.match(r"error: (the disk is full|.* cannot be written: it needs [\d,]+ bytes, and [\d,]+ are free)", said)
    assert last == "to go on: the same command with resume=auto"
    (small_disk / "filler").unlink()
    assert not [*(small_disk / "tiny").rglob("*.tmp")]
    ended_well(run(file, "resume=auto"), 0)
    assert_same(small_disk / "tiny", whole)
