"""The files of a finished run, written by hand: what a report reads, with no training."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

# A name that would be markup, if it were not escaped.
NASTY = 'a<b>&"c'


def phase_audit(name: str, **changes: Any) -> dict[str, Any]:
    plain = {
        "name": name,
        "ok": True,
        "completed": True,
        "freeze": ["trunk"],
        "frozen": {"count": 3, "root": "0123456789abcdef", "fingerprints": {}},
        "trainable": {"count": 2, "changed": 2},
        "checks": {"steps": 4, "tripwires": 20, "fingerprints": 6},
        "unproven": "",
        "violations": [],
        "hazards": [],
    }
    return plain | changes


def finding(name: str, **changes: Any) -> dict[str, Any]:
    plain = {"kind": "param_changed", "name": name, "phase": "warm", "step": 3, "cause": "weight decay"}
    plain |= {"detail": "its bytes differ", "since": 1, "max_abs": 0.5, "share": 1.0, "pattern": "trunk"}
    return plain | changes


def phase_plan(name: str, parts: list[tuple[str, int, int, int]] | None = None) -> dict[str, Any]:
    """Args: `parts` are names, tensors, how many of them are frozen, and how many no task reaches."""
    shown = [("00 stem", 2, 2, 0), ("heads.depth", 2, 0, 0)] if parts is None else parts
    flops = {"forward": 10, "backward": 10, "forward_of_all": 10, "backward_of_all": 30, "saved": 0.5}
    plain = {"name": name, "length": "2 epochs", "optimizer": "adamw", "freeze": ["trunk"], "train": [], "flops": flops}
    keys = ("name", "count", "frozen", "unreached")
    return plain | {"parts": [dict(zip(keys, part, strict=True)) for part in shown]}


KEPT = {"kept_in": "ram", "modules": 0, "image_s": 0.1, "num_computed": 10, "compute_s": 2.0, "num_read": 60}
MACHINE = {"system": "Linux x86_64", "processor": "Pentium 90", "cores": 1, "memory_bytes": 16_000_000}
SESSION = {
    "step": 0,
    "began": "2026-01-02T03:04:05+00:00",
    "device": "cpu",
    "gpu": None,
    "machine": MACHINE,
    "tracked_at": None,
    "versions": {"mtl": "0.1.0", "torch": "2.8"},
    "git_commit": "c0ffee",
}


def run_content(name: str = "one", task: str = "depth", phases: tuple[str, str] = ("warm", "fine")) -> dict[str, Any]:
    """The content of each file of a run of two phases, four steps each, that was validated every second step."""
    first, second = phases
    rows: list[dict[str, Any]] = []
    for step in range(1, 9):
        phase = first if step <= 4 else second
        common = {"step": step, "epoch": (step + 1) // 2, "phase": phase}
        losses = {"train/loss": 1 / step, f"train/loss/{task}": 2 / step, "train/grad_norm": 1.0, "train/lr": 1e-3}
        rows.append({**common, **losses, "perf/images_per_s": 100.0})
        if step % 2 == 0:
            rows.append(
                {**common, f"val/{task}/rmse": 4 - step / 4, f"val/{task}/delta1": step / 10} | {"val/score": step / 16}
            )
    scores = {phase: {task: {"rmse": 4 - step / 4, "delta1": step / 10}} for phase, step in ((first, 4), (second, 8))}
    directions = {"rmse": "lower", "delta1": "higher"}
    ends = [
        {"ended": first, "entered": second, "reason": "2 epochs done", "step": 4, "epoch": 2, "train_s": 10.0},
        {"ended": second, "entered": None, "reason": "plateau of val/score", "step": 8, "epoch": 4, "train_s": 30.0},
    ]
    kept = [KEPT, {"kept_in": "off"}]
    results = {
        "tasks": {task: {"metric": "rmse", "perfect": 0.0, "directions": directions}},
        "trivial": {task: {"rmse": 5.0, "delta1": 0.05}},
        "phases": [end | {"kept": own, "scores": scores[end["ended"]]} for end, own in zip(ends, kept, strict=True)],
        "best": {"score": 0.5, "step": 8},
        "train_s": 30.0,
        "sessions": [SESSION],
    }
    config = {
        "name": name,
        "trunk": {"name": "resnet18"},
        "data": {"name": "scenes", "batch_size": 8},
        "tasks": {task: {"type": "depth"}},
        "phases": [{"name": first, "freeze": ["trunk"], "epochs": 2}, {"name": second, "epochs": 2}],
    }
    return {
        "config.yaml": config,
        "metrics.jsonl": rows,
        "audit.json": {"ok": True, "phases": [phase_audit(each) for each in phases]},
        "plan.json": {"trunk": "resnet18", "world_size": 1, "phases": [phase_plan(each) for each in phases]},
        "results.json": results,
        "history.json": {"command": f"mtl train {name}.yaml", "from": None, "changes": []},
        "data.json": {"images": {"train": 16, "val": 4}, "digests": {}},
        "checkpoints/last/state.json": {"scores": scores, "train_s": 30.0, "world_size": 1, "git_commit": "c0ffee"},
    }


def write_run(folder: Path, content: dict[str, Any]) -> Path:
    """Writes the files of a run, and returns its directory."""
    for name, each in deepcopy(content).items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".yaml"):
            text = yaml.safe_dump(each, sort_keys=False)
        elif name.endswith(".jsonl"):
            text = "".join(json.dumps(row) + "\n" for row in each)
        else:
            text = json.dumps(each)
        file.write_text(text)
    return folder
