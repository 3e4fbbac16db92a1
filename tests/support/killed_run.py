"""A program that tests run: trains a configuration, is killed again and again, and resumes each time.

    python killed_run.py CONFIG SEED NUM_KILLS

Each life is a process of its own, forked before anything was computed. Every other one is killed by the clock at a
random time; the rest kill themselves in the middle of a random file operation. Prints where each one died, as JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from mtl.cli import main

_OPERATIONS = ("fsync", "rename", "replace", "link", "symlink", "unlink", "truncate", "mkdir")


def die_at(number: int) -> None:
    """Kills this process before its n-th file operation, or right after it."""
    left = [number]

    def wrapped(call: Callable[..., Any]) -> Callable[..., Any]:
        def act(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == 0 and number % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return call(*arguments, **options)
            finally:
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        return act

    for name in _OPERATIONS:
        setattr(os, name, wrapped(getattr(os, name)))


def live(file: str, operations: int | None) -> int:
    """One life, in a process of its own; returns its process id."""
    child = os.fork()
    if child == 0:
        code = 9
        try:
            if operations is not None:
                die_at(operations)
            code = main(["train", file, "-q", "resume=auto"])
        finally:
            os._exit(code)
    return child


def size(run_dir: Path) -> int:
    metrics = run_dir / "metrics.jsonl"
    return metrics.stat().st_size if metrics.exists() else 0


def where(run_dir: Path) -> dict[str, Any]:
    """What there is after a death: the steps logged, whether a checkpoint was half written, the last one's place."""
    metrics = run_dir / "metrics.jsonl"
    rows = metrics.read_bytes().splitlines() if metrics.exists() else []
    found: dict[str, Any] = {"rows": len(rows), "half": bool([*(run_dir / "checkpoints").glob(".*")])}
    last = run_dir / "checkpoints/last/state.json"
    if last.exists():
        state = json.loads(last.read_text())
        found |= {"step": state["step"], "phase": state["phase"], "within": bool(state["within_epoch"])}
        found |= {"kept_in": state["features"]["kept_in"]}
    return found


def run(file: str, seed: int, num_kills: int) -> None:
    draw = random.Random(seed)
    config = yaml.safe_load(Path(file).read_text())
    run_dir = Path(config["runs_dir"]) / config["name"]
    deaths = 0
    while deaths < num_kills:
        by_clock = deaths % 2 == 0
        child = live(file, None if by_clock else draw.randrange(5, 120))
        before, deadline = size(run_dir), time.monotonic() + 600
        is_waited_for = by_clock
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            if is_waited_for and size(run_dir) != before:
                # It trains by now.
                is_waited_for, deadline = False, time.monotonic() + draw.uniform(0, 0.25)
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.005)
        if os.WIFSIGNALED(status):
            deaths += 1
            sys.stdout.write(json.dumps({"by": "clock" if by_clock else "file", **where(run_dir)}) + "\n")
        elif os.WEXITSTATUS(status) == 0:
            sys.stdout.write(json.dumps({"finished_after": deaths, **where(run_dir)}) + "\n")
            return
        else:
            raise SystemExit(f"a life ended with {status} after {deaths} deaths")
    _, status = os.waitpid(live(file, None), 0)
    raise SystemExit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 99)


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
