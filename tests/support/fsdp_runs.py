"""Small runs whose model is spread over processes, for tests: real torchrun, real files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import fsdp_run_script
from mtl.audit.offline.run import audit_run
from mtl.config import load_config
from mtl.training.run import train
from mtl.training.setup import assemble
from processes import run_in_processes
from runs import read_memory, read_metrics, read_model

FROZEN = "type:BatchNorm2d"
CONFIG: dict[str, Any] = {
    "name": "run",
    "trunk": {"name": "test_vit", "weights": "none"},
    "data": {"name": "scenes", "image_size": 32, "batch_size": 8, "num_train": 32, "num_val": 12},
    "tasks": {
        "segmentation": {"type": "segmentation", "num_classes": 13},
        "depth": {"type": "depth"},
        "object": {"type": "classification", "num_classes": 10},
    },
    "balance": {"method": "uw"},
    # With an epsilon this large, AdamW does not make steps of the rounding of gradients.
    "optim": {
        "accumulate": 2,
        "clip_norm": 1.0,
        "ema_decay": 0.9,
        "optimizer": {"name": "adamw", "options": {"eps": 1e-3}},
    },
    "tracking": {"mode": "disabled", "log_every_steps": 1},
    "checkpoint": {"every_steps": 1},
    "audit": {"gradients_every_steps": 2},
    "phases": [
        {"name": "heads", "freeze": ["trunk", FROZEN], "epochs": 1},
        {"name": "half", "freeze": ["trunk.patch_embed", "trunk.blocks.0", "heads.object", FROZEN], "epochs": 1},
        {"name": "all", "freeze": [FROZEN], "epochs": 2, "restore": "best"},
    ],
}
NUM_STEPS = 8
SPREAD = "distributed.strategy=fsdp2"
DCP = "distributed.checkpoint=dcp"


def write_config(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / "config.yaml"
    data = CONFIG["data"] | {"cache_dir": str(folder.parent / "data")}
    content = CONFIG | {"runs_dir": str(folder / "runs"), "data": data} | changes
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def run(folder: Path, number: int, *overrides: str, in_forks: bool = True, **order: Any) -> list[dict[str, Any]]:
    """Trains the folder's configuration in `number` processes; returns what each has found."""
    arguments = [str(folder / "config.yaml"), *overrides]
    (folder / "order.json").write_text(json.dumps({"arguments": arguments, **order}))
    run_in_processes(Path(fsdp_run_script.__file__).read_text(), folder, number, in_forks)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(number)]


def run_alone(folder: Path, **changes: Any) -> Path:
    return train(assemble(load_config(write_config(folder, **changes), []), quiet=True), quiet=True).run_dir


def losses(run_dir: Path) -> list[float]:
    """Losses and gradient norms of all steps."""
    rows = [row for row in read_metrics(run_dir) if "train/loss" in row]
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    return [row[key] for row in rows for key in sorted(row) if key.startswith(("train/loss", "train/grad_norm"))]


def check_same(got: Path, expected: Path) -> None:
    """The same run but for the order in which sums were rounded."""
    assert losses(got) == pytest.approx(losses(expected), rel=1e-5)
    one, other = read_model(got / "checkpoints/last"), read_model(expected / "checkpoints/last")
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-5, atol=1e-6, msg=name)
    memory, wanted = (read_memory(each / "checkpoints/last") for each in (got, expected))
    for name, tensor in wanted.items():
        if not name.startswith("own/"):
            torch.testing.assert_close(memory[name], tensor, rtol=1e-3, atol=1e-6, msg=name)
    audits = [json.loads((each / "audit.json").read_text()) for each in (got, expected)]
    for phase, wanted_phase in zip(*(audit["phases"] for audit in audits), strict=True):
        assert phase["ok"] and phase["completed"]
        assert phase["trainable"] == wanted_phase["trainable"]
    # What was frozen from the first has the fingerprints that one process takes, of the whole.
    assert audits[0]["phases"][0]["frozen"] == audits[1]["phases"][0]["frozen"]
    assert audit_run(got).findings == []
