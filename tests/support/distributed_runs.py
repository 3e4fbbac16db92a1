"""Small runs in several processes, for tests: real torchrun, real files."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

from processes import HANGS_S, Process, started, torchrun
from runs import TINY, TWO, tiny_config

PROGRAM = str(Path(__file__).parent / "planted_run.py")

# What makes a step independent of how its batch is spread: a trunk without BatchNorm, and heads whose own is frozen.
# Batches of 8 are not divisible by 3, those of 6 are; an epoch's last step has one batch only.
EQUAL: dict[str, Any] = {
    "trunk": {"name": "test_vit"},
    "tasks": TWO,
    "data": {**TINY["data"], "num_train": 44},
    "optim": {"ema_decay": 0.9, "accumulate": 2, "clip_norm": 1.0},
    "freeze_always": ["type:BatchNorm2d"],
    "tracking": {"mode": "offline", "log_every_steps": 1},
    "checkpoint": {"every_steps": 2, "keep_every_epochs": 3},
    "phases": [
        {"name": "heads", "freeze": ["trunk"], "epochs": 2, "cache": "ram", "balance": "famo"},
        {"name": "half", "freeze": ["trunk@first:50%"], "epochs": 2, "batch_size": 6, "balance": "random"},
        {"name": "all", "steps": 4, "lr": 1e-3, "balance": "dwa"},
    ],
}


def command(number: int, folder: Path, *arguments: str, options: tuple[str, ...] = (), **changes: Any) -> list[str]:
    """The command that trains `EQUAL`, with top-level keys changed, in several processes."""
    file = tiny_config(folder, **{**EQUAL, **changes})
    return torchrun(number, PROGRAM, "train", "-q", str(file), *arguments, options=options)


def surroundings(cache_dir: Path, planted: dict[str, Any] | None = None, folder: Path | None = None) -> dict[str, str]:
    """Environment variables of a run; see `planted_run`."""
    found = {"MTL_CACHE_DIR": str(cache_dir), "WANDB_MODE": "offline", "MTL_TEST_PLANTED": json.dumps(planted or {})}
    return found if folder is None else found | {"MTL_TEST_FOLDER": str(folder)}


def finish(command: list[str], environment: dict[str, str], seconds: float = HANGS_S) -> tuple[int, str]:
    """Runs a command to its end; returns its exit code, and what it said on standard error."""
    with started(command, **environment) as process:
        _, said = process.communicate(timeout=seconds)
    return process.returncode, said


def ask_to_end(process: Process, seconds: float = HANGS_S) -> str:
    """Sends SIGTERM, as Slurm does; returns what was said on standard error."""
    process.send_signal(signal.SIGTERM)
    return process.communicate(timeout=seconds)[1]
