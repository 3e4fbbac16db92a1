"""Small real runs for tests: seconds on two cores, every part of the house in use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file
from torch import Tensor

from mtl.checkpoint.tensor_file import is_in_shards, read_shards
from mtl.config import load_config
from mtl.training.setup import RunSetup, assemble

TINY: dict[str, Any] = {
    "name": "tiny",
    "trunk": {"name": "test_resnet"},
    "data": {"name": "scenes", "image_size": 32, "batch_size": 8, "num_train": 40, "num_val": 20},
    "tasks": {
        "segmentation": {"type": "segmentation", "num_classes": 13},
        "depth": {"type": "depth"},
        "normals": {"type": "normals"},
        "object": {"type": "classification", "num_classes": 10},
    },
    "balance": {"method": "uw"},
    "tracking": {"mode": "disabled", "log_every_steps": 2},
    "phases": [
        {"name": "warm-heads", "freeze": ["trunk"], "epochs": 1, "lr": 2e-3},
        {"name": "finetune", "freeze": ["trunk.conv1", "trunk.bn1", "heads.object"], "steps": 7},
    ],
}

TWO: dict[str, Any] = {name: TINY["tasks"][name] for name in ("depth", "object")}


def tiny_config(folder: Path, **changes: Any) -> Path:
    """Writes the tiny configuration, with top-level keys changed, and returns the file."""
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY | {"runs_dir": str(folder / "runs")} | changes, sort_keys=False))
    return file


def tiny_parts(folder: Path, *overrides: str, **changes: Any) -> RunSetup:
    return assemble(load_config(tiny_config(folder, **changes), overrides), quiet=True)


def small_config(folder: Path, **changes: Any) -> Path:
    """As `tiny_config`, with a dense task and one of whole images: for what does not depend on more of them."""
    return tiny_config(folder, **{"tasks": TWO} | changes)


def small_parts(folder: Path, *overrides: str, **changes: Any) -> RunSetup:
    return assemble(load_config(small_config(folder, **changes), overrides), quiet=True)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def exact_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows without what a clock measured, which two runs never have in common."""
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in read_metrics(run_dir)]


def read_memory(folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint next to its model."""
    return read_shards(folder, ["optimizer"]) if is_in_shards(folder) else load_file(folder / "optimizer.safetensors")


def read_model(folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint's model, those that were frozen too."""
    if is_in_shards(folder):
        return read_shards(folder)
    frozen = folder / "frozen.safetensors"
    return load_file(folder / "model.safetensors") | (load_file(frozen) if frozen.exists() else {})


def hide_labels(parts: RunSetup) -> None:
    """Takes labels away, from some images all and from some none."""
    labels = parts.train.labels
    for place in range(len(parts.train)):
        labels["depth"][place, :, : place % 32] = 0
        labels["segmentation"][place, : 5 * (place % 7)] = 255
        labels["normals"][place, :, :, : 8 * (place % 5)] = 0
        labels["object"][place] = -1 if place % 3 else labels["object"][place]
