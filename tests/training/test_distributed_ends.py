"""Runs in several processes that end: one is killed, one is asked to stop, none can begin."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from distributed_runs import command, surroundings
from distributed_runs import finish as ended
from forks import Forked
from processes import HANGS_S, Process, torchrun, wait_until, workers
from runs import tiny_config


def start(number: int, file: Path, *arguments: str, forked: bool = True) -> Process:
    """A run in several processes, which are forks or have a Python each."""
    command = torchrun(number, "-m", "mtl", "train", str(file), "-q", *arguments)
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    said = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    if forked:
        return Forked(command[1:], **said, new_session=True, env=surroundings)
    return subprocess.Popen(command, **said, text=True, start_new_session=True, env=surroundings)  # type: ignore[call-overload]


def finish(process: Process, expected: int = 0) -> str:
    said, _ = process.communicate(timeout=HANGS_S)
    assert process.returncode == expected, said[-3000:]
    return said


def started_and_signalled(folder: Path, sent: signal.Signals, forked: bool = True) -> Process:
    """A long run of two processes, the second of which was sent a signal in the middle."""
    file, metrics = tiny_config(folder, phases=[{"name": "all", "epochs": 500}]), folder / "runs/tiny/metrics.jsonl"
    process = start(2, file, forked=forked)
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 4, 120)
    os.kill(workers(process)[1], sent)
    return process


@pytest.mark.slow
def test_a_process_that_is_killed_ends_all_with_a_clear_error(tmp_path: Path) -> None:
    process = started_and_signalled(tmp_path, signal.SIGKILL)
    # Long before `distributed.timeout_s` would end them, or this wait.
    said = finish(process, 1)
    assert "error: Another rank exited; see its log." in said or "Signal 9 (SIGKILL)" in said


@pytest.mark.slow
def test_processes_stop_together_when_one_is_asked_to(tmp_path: Path) -> None:
    # With torchrun as it is: everywhere else its processes, and torchrun itself, are forks.
    process = started_and_signalled(tmp_path, signal.SIGTERM, forked=False)
    said = finish(process, 1)
    assert "stopped by SIGTERM after step" in said or "stopped by another process after step" in said
    assert (tmp_path / "runs/tiny/checkpoints/last/state.json").is_file()


@pytest.mark.slow
def test_what_several_processes_cannot_do_is_said(tmp_path: Path) -> None:
    file = tiny_config(tmp_path, phases=[{"name": "all", "epochs": 1}])
    said = finish(start(3, file, "data.batch_size=4"), 1)
    assert "data.batch_size: expected batches of 6 images or more for 3 processes, two each" in said
    assert "exitcode  : 2" in said.replace("exitcode : 2", "exitcode  : 2")
    assert not (tmp_path / "runs/tiny").exists()


PHASES = [{"name": "heads", "freeze": ["trunk"], "epochs": 2}, {"name": "all", "epochs": 1}]


def write_to_the_trunk_of_one_process(folder: Path, cache_dir: Path, *arguments: str) -> tuple[int, str]:
    """A run of two processes, in the second of which a frozen weight is written once."""
    planted = {"what": "write", "rank": 1, "step": 2, "name": "trunk.blocks.0.attn.qkv.weight"}
    whole = command(2, folder, *arguments, phases=PHASES, checkpoint={}, freeze_always=[])
    return ended(whole, surroundings(cache_dir, planted) | {"WANDB_MODE": "disabled"})


@pytest.mark.slow
def test_what_one_process_alone_finds_is_in_the_reports_of_all(tmp_path: Path, cache_dir: Path) -> None:
    code, said = write_to_the_trunk_of_one_process(tmp_path, cache_dir, "audit.policy=collect")
    assert code == 1 and "exitcode  : 3" in said, said[-3000:]
    assert (tmp_path / "runs/tiny/report.html").is_file()
    names = {}
    for name in ("audit.json", "audit.rank-1.json"):
        audit = json.loads((tmp_path / "runs/tiny" / name).read_text())
        names[name] = {(each["kind"], each["name"]) for each in audit["phases"][0]["violations"]}
    assert names["audit.json"] == names["audit.rank-1.json"]
    assert ("param_changed", "trunk.blocks.0.attn.qkv.weight") in names["audit.json"]
    assert ("ranks_differ", "trunk.blocks.0.attn.qkv.weight") in names["audit.json"]


@pytest.mark.slow
def test_a_run_that_the_audit_ended_is_not_resumed_unless_it_is_asked_for(tmp_path: Path, cache_dir: Path) -> None:
    code, said = write_to_the_trunk_of_one_process(tmp_path, cache_dir)
    assert code == 1 and "exitcode  : 3" in said and "audit.rank-1.json" in said, said[-3000:]
    file = tmp_path / "tiny.yaml"
    said = finish(start(2, file, "resume=auto"), 1)
    assert "exitcode  : 2" in said
    assert "resume: the audit ended this run" in said and "param_changed, step 2 of phase 'heads'" in said
    said = finish(start(2, file, "resume=auto", "resume_override=true"))
    assert said.count("it resumes from what was saved before that") == 1
    assert not list((tmp_path / "runs/tiny").glob("audit.rank-*"))
