"""scripts/slurm.sh with a Slurm of our own: what it would start, what it ends with, and when it is queued again."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from processes import HANGS_S, wait_until

SCRIPT = Path(__file__).parents[2] / "scripts/slurm.sh"
# Each writes down how it was called; srun then does as the test says.
SRUN = """#!{python}
import json, os, signal, sys, time
kept = {{key: os.environ.get(key) for key in ("OMP_NUM_THREADS", "PYTHONPATH", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE")}}
def end(number, frame):
    open("{folder}/got-term", "a").write("x")
    while os.environ.get("SAVES") and not os.path.exists("{folder}/saved"):
        time.sleep(0.01)
    sys.exit(int(os.environ.get("ENDS", "0")))
signal.signal(signal.SIGTERM, end)
signal.alarm(600)  # nothing is left of a test that failed
with open("{folder}/srun.json", "w") as stream:
    json.dump({{"arguments": sys.argv[1:], "cwd": os.getcwd(), **kept}}, stream)
os.rename("{folder}/srun.json", "{folder}/srun-called.json")
while os.environ.get("WAITS"):
    signal.pause()
sys.exit(int(os.environ.get("ENDS", "0")))
"""
SCONTROL = """#!/bin/bash
echo "$*" >> "{folder}/scontrol"
[ "$1" = show ] && printf 'node-a\\nnode-b\\n'
exit 0
"""


@pytest.fixture
def slurm(tmp_path: Path) -> Path:
    """A folder with a `bin` in which srun and scontrol are ours."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text.format(python=sys.executable, folder=tmp_path))
        (tools / name).chmod(0o755)
    return tmp_path


def start(slurm: Path, *arguments: str, **changes: str) -> subprocess.Popen[str]:
    job = {
        "SLURM_SUBMIT_DIR": str(slurm),
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_JOB_ID": "123456",
        "SLURM_NNODES": "2",
        "SLURM_CPUS_PER_TASK": "8",
        "MTL_PROJECT": "/the/project",
        "PYTHON": "/the/python",
        "PATH": f"{slurm / 'bin'}:{os.environ['PATH']}",
    }
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMP_", "PYTHON"))}
    return subprocess.Popen(
        ["bash", str(SCRIPT), *arguments],
        env=clean | job | changes,
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, err = process.communicate(timeout=HANGS_S)
    assert err == ""
    return process.returncode, out


def is_pending(pid: int, sent: signal.Signals) -> bool:
    """Whether a process has not observed a signal yet."""
    status = Path(f"/proc/{pid}/status").read_text()
    return any(
        int(mask, 16) >> (sent - 1) & 1 for mask in re.findall(r"^(?:SigPnd|ShdPnd):\s+(\w+)$", status, re.MULTILINE)
    )


def requeued(slurm: Path) -> bool:
    return "requeue 123456" in (slurm / "scontrol").read_text()


def test_it_starts_one_torchrun_on_each_machine_that_resumes_by_itself(slurm: Path) -> None:
    assert finish(start(slurm, "configs/a b.yaml", "name=big", SLURM_GPUS_ON_NODE="4")) == (0, "")
    called = json.loads((slurm / "srun-called.json").read_text())
    assert called["arguments"] == [
        *("--kill-on-bad-exit=1", "/the/python", "-m", "torch.distributed.run"),
        *("--nnodes=2", "--nproc-per-node=4", "--max-restarts=0"),
        *("--rdzv-id=123456", "--rdzv-backend=c10d", "--rdzv-endpoint=node-a:23456"),
        *("-m", "mtl", "train", "configs/a b.yaml", "name=big", "resume=auto"),
    ]
    assert (called["OMP_NUM_THREADS"], called["PYTHONPATH"], called["cwd"]) == ("2", "/the/project", str(slurm))
    assert called["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert not requeued(slurm)


@pytest.mark.parametrize(
    ("given", "processes", "threads"),
    [
        ({}, "1", "8"),
        ({"PROCESSES": "3"}, "3", "2"),
        ({"PROCESSES": "16"}, "16", "1"),
        ({"SLURM_GPUS_ON_NODE": "8", "PROCESSES": "2"}, "2", "4"),
        ({"SLURM_GPUS_ON_NODE": "0"}, "1", "8"),
        ({"OMP_NUM_THREADS": "5"}, "1", "5"),
    ],
)
def test_processes_share_the_cpus_of_a_machine(
    slurm: Path, given: dict[str, str], processes: str, threads: str
) -> None:
    assert finish(start(slurm, "c.yaml", **given)) == (0, "")
    called = json.loads((slurm / "srun-called.json").read_text())
    assert f"--nproc-per-node={processes}" in called["arguments"] and called["OMP_NUM_THREADS"] == threads


@pytest.mark.parametrize("code", ["0", "1", "2", "3", "137"])
def test_a_job_that_ends_by_itself_ends_with_its_code_and_is_not_queued_again(slurm: Path, code: str) -> None:
    assert finish(start(slurm, "c.yaml", ENDS=code)) == (int(code), "")
    assert not requeued(slurm)


@pytest.mark.parametrize(("code", "again"), [("1", True), ("0", False), ("143", True)])
def test_when_the_time_is_up_it_waits_for_the_checkpoint_and_is_queued_again(
    slurm: Path, code: str, again: bool
) -> None:
    process = start(slurm, "c.yaml", ENDS=code, WAITS="1")
    wait_until((slurm / "srun-called.json").exists)
    process.send_signal(signal.SIGTERM)
    ended, out = finish(process)
    assert ended == int(code) and requeued(slurm) == again == ("queued again" in out)
    assert (slurm / "got-term").read_text() == "x"


def test_a_second_signal_does_not_queue_it_again_before_the_processes_have_saved(slurm: Path) -> None:
    process = start(slurm, "c.yaml", ENDS="0", WAITS="1", SAVES="1")
    wait_until((slurm / "srun-called.json").exists)
    process.send_signal(signal.SIGTERM)
    wait_until((slurm / "got-term").exists)
    process.send_signal(signal.SIGTERM)
    wait_until(lambda: not is_pending(process.pid, signal.SIGTERM))
    (slurm / "saved").touch()
    # They had saved all and were over: nothing is left to resume.
    assert finish(process) == (0, "")
    assert not requeued(slurm)
