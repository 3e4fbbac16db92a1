"""Whether two checkouts of this project train to the same bits: for a change that must not change any result.

Trains small configurations that together use every part of the loop, and prints digests of what each run left: the
tensors of its last and best checkpoints, its metrics but for times, and its audit. Some are also killed inside an epoch
and resumed, which can be under another checkout. Bits are those of one machine, so both sides run here.

python scripts/bench/same_bits.py --write before.json             # with the checkout that this file lies in
python scripts/bench/same_bits.py --checkout ../old --write before.json
python scripts/bench/same_bits.py --against before.json           # exit code 1, and the names, if anything differs
python scripts/bench/same_bits.py --begin-with ../old --against before.json   # killed there, resumed here
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]

BASE: dict[str, Any] = {
    "trunk": {"name": "test_resnet"},
    "data": {"name": "scenes", "image_size": 32, "batch_size": 8, "num_train": 40, "num_val": 16},
    "tasks": {
        "segmentation": {"type": "segmentation", "num_classes": 13},
        "depth": {"type": "depth"},
        "normals": {"type": "normals"},
        "object": {"type": "classification", "num_classes": 10},
    },
    "tracking": {"mode": "disabled", "log_every_steps": 2},
    "checkpoint": {"every_steps": 3},
    "memory_format": "contiguous",
    "precision": "fp32",
    "device": "cpu",
    "balance": {"method": "uw"},
    "phases": [
        {"name": "warm-heads", "freeze": ["trunk"], "epochs": 2, "lr": 2e-3, "cache": "ram"},
        {"name": "finetune", "freeze": ["trunk@first:50%", "heads.object"], "epochs": 2},
    ],
}
_ALL = [{"name": "all", "freeze": [], "epochs": 2}]
_PART = [{"name": "part", "freeze": ["trunk.conv1", "trunk.bn1"], "epochs": 2}]
# Each: what differs from BASE, and on how many processes.
RUNS: dict[str, tuple[dict[str, Any], int]] = {
    "kept-trunk-then-prefix": ({}, 1),
    "kept-on-disk": ({"cache": {"mode": "disk", "dir": "features"}}, 1),
    "not-kept": ({"cache": {"mode": "off"}, "phases": [{"name": "a", "freeze": ["trunk"], "epochs": 2}]}, 1),
    "accumulate-clip-views": (
        {
            "optim": {"accumulate": 2, "clip_norm": 1.0},
            "data": BASE["data"] | {"augment": {"brightness": 0.2, "contrast": 0.2}},
            "cache": {"views": 2},
        },
        1,
    ),
    "fp16-scaler": ({"precision": "fp16", "phases": _PART, "optim": {"ema_decay": 0.9}}, 1),
    "famo": ({"balance": {"method": "famo"}, "phases": _PART}, 1),
    "upgrad": ({"balance": {"method": "upgrad"}, "phases": _PART}, 1),
    "random-weights": ({"balance": {"method": "random"}, "phases": _ALL}, 1),
    "ema-restore-best": (
        {
            "optim": {"ema_decay": 0.8},
            "phases": [
                {"name": "one", "freeze": [], "epochs": 3, "lr": 3e-2},
                {"name": "two", "freeze": ["trunk", "heads", "!heads.depth"], "epochs": 1, "restore": "best"},
                {"name": "three", "freeze": ["heads.depth"], "steps": 4, "optimizer_state": "reset"},
                {"name": "judge", "evaluate_only": True},
            ],
        },
        1,
    ),
    "plateau-repeat": (
        {
            "phases": [
                {
                    "repeat": 2,
                    "phases": [
                        {"name": "heads", "freeze": ["trunk"], "steps": 3},
                        {
                            "name": "trunk",
                            "train": ["trunk", "heads.depth"],
                            "until": {"plateau": "val/score", "patience": 1},
                            "max_epochs": 2,
                        },
                    ],
                }
            ]
        },
        1,
    ),
    "drop-path": ({"trunk": {"name": "test_vit", "options": {"drop_path_rate": 0.3}}, "phases": _ALL}, 1),
    "two-processes": ({}, 2),
    "two-processes-famo": ({"balance": {"method": "famo"}, "phases": _PART, "optim": {"accumulate": 2}}, 2),
    "two-processes-fsdp2": ({"distributed": {"strategy": "fsdp2"}, "phases": _PART}, 2),
}
# Killed after this many rows of steps; such a run ends with the bits of the one that it is a copy of.
KILLED = ("kept-trunk-then-prefix", "accumulate-clip-views", "fp16-scaler", "famo", "ema-restore-best", "drop-path")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, default=ROOT, help="whose code trains; this one if not given")
    parser.add_argument("--begin-with", type=Path, help="whose code begins the runs that are killed")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), help="names of runs")
    parser.add_argument("--write", type=Path, metavar="FILE", help="where the digests go")
    parser.add_argument("--against", type=Path, metavar="FILE", help="digests that have to be the same")
    options = parser.parse_args()
    found: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only:
            found[name] = _trained(name, Path(folder) / "whole", options.checkout, None)
            sys.stdout.write(f"{name}: {json.dumps(found[name])}\n")
            if name in KILLED:
                begin = options.begin_with or options.checkout
                found[f"{name}, killed"] = _trained(name, Path(folder) / "killed", options.checkout, begin)
                sys.stdout.write(f"{name}, killed: {json.dumps(found[f'{name}, killed'])}\n")
            sys.stdout.flush()
    if options.write is not None:
        options.write.write_text(json.dumps(found, indent=1) + "\n")
    if options.against is None:
        return 0
    before = json.loads(options.against.read_text())
    differ = [f"{name}: {what}" for name in found for what in found[name] if found[name][what] != before[name][what]]
    sys.stdout.write("".join(f"differs: {each}\n" for each in differ) or f"{len(found)} runs: the same bits\n")
    return int(bool(differ))


def _trained(name: str, folder: Path, checkout: Path, begin: Path | None) -> dict[str, str]:
    """Trains a run, and returns its digests; `begin` is the checkout that begins it, if it is to be killed once."""
    changes, num_processes = RUNS[name]
    config = copy.deepcopy(BASE) | copy.deepcopy(changes) | {"name": name}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    if begin is not None:
        _kill_after(_start(begin, folder, file, 1, "resume=auto"), folder / "runs" / name / "metrics.jsonl", 4)
    process = _start(checkout, folder, file, num_processes, "resume=auto")
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"{name}: exit code {process.returncode}\n{errors}")
    return dict(_digests(folder / "runs" / name))


def _start(checkout: Path, folder: Path, file: Path, num_processes: int, *overrides: str) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(num_processes)] if num_processes > 1 else []
    command = [sys.executable, *launcher, "-m", "mtl", "train", str(file), "-q", *overrides]
    environment = os.environ | {
        "PYTHONPATH": str(checkout.resolve()),
        "OMP_NUM_THREADS": "1",
        "MTL_CACHE_DIR": str(folder / "cache"),
    }
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def _kill_after(process: subprocess.Popen[str], metrics: Path, num_rows: int) -> None:
    """Kills a run once it has logged `num_rows` rows and saved something."""
    last = metrics.parent / "checkpoints" / "last"
    while process.poll() is None:
        if last.exists() and metrics.exists() and metrics.read_bytes().count(b"\n") >= num_rows:
            process.kill()
        time.sleep(0.01)
    process.communicate()


def _digests(run_dir: Path) -> Iterator[tuple[str, str]]:
    for link in sorted((run_dir / "checkpoints").glob("[!s]*")):
        if link.is_symlink():
            yield link.name, _of_tensors(link)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    yield "metrics", _of([{key: row[key] for key in sorted(row) if not key.startswith("perf/")} for row in rows])
    audit = json.loads((run_dir / "audit.json").read_text())
    for phase in audit["phases"]:
        # How often a process has looked also depends on when it was killed; whose freeze it is names files and lines.
        phase.pop("checks", None)
    yield "audit", _of(audit)


def _of_tensors(folder: Path) -> str:
    found = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        if file.name != "optimizer.safetensors":
            for name, tensor in sorted(load_file(file).items()):
                found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                found.update(tensor.contiguous().view(-1).view(dtype=torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def _of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
