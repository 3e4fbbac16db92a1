"""Kept features for heads that read tokens, and a whole run with every head."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl.config import ConfigError, HeadConfig, TrunkConfig
from mtl.freeze import enforce, plan_freeze
from mtl.model import MultiTaskModel
from mtl.model.heads import HEADS
from mtl.model.prefix import Prefix
from mtl.tasks import Classification, Depth, Task
from mtl.training.run import train
from runs import read_model, tiny_parts

TASKS: dict[str, Task] = {"depth": Depth(), "pooled": Classification(3), "tokens": Classification(2)}
HEADS_OF = {"tokens": HeadConfig(name="attention_pool")}


@pytest.mark.parametrize("freeze", ["trunk", "trunk@first:50%"])
@pytest.mark.parametrize("active", [["tokens"], ["tokens", "depth"], ["tokens", "pooled"], None])
def test_replayed_tokens_and_all_gradients_are_those_of_a_plain_pass(freeze: str, active: list[str] | None) -> None:
    torch.manual_seed(0)
    model = MultiTaskModel(TrunkConfig(name="test_vit"), TASKS, 32, heads=HEADS_OF)
    enforce(model, plan_freeze(model, [freeze]))
    images = model.prepare(torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8))
    prefix = Prefix.record(model.trunk, partial(model.read, tasks=active), images)
    with torch.no_grad():
        kept = prefix.compute(images)
    assert bool(prefix.modules) == (freeze != "trunk")
    found = []
    for features in (model.read(images, active), prefix.replay([tensor.clone() for tensor in kept])):
        model.zero_grad()
        outputs = model.decode(features, (32, 32), active)
        assert features.kinds == model.reads(active)
        torch.stack([output.square().mean() for output in outputs.values()]).sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append({**outputs, **gradients})
    plain, replayed = found
    assert plain.keys() == replayed.keys() and len(plain) > 5
    assert all(torch.equal(plain[name], replayed[name]) for name in plain)


def _run(folder: Path, cache: str) -> dict[str, Tensor]:
    folder.mkdir()
    head = {"type": "classification", "num_classes": 10, "head": "attention_pool"}
    changes: dict[str, Any] = {
        "trunk": {"name": "test_vit"},
        "tasks": {"object": head, "depth": {"type": "depth"}},
        "data": {"name": "scenes", "image_size": 32, "batch_size": 8, "num_train": 16, "num_val": 8},
        "phases": [
            {"name": "tokens", "freeze": ["trunk"], "epochs": 2, "tasks": ["object"], "cache": cache},
            {"name": "both", "freeze": ["trunk@first:50%"], "epochs": 2, "cache": cache},
        ],
    }
    run_dir = train(tiny_parts(folder, **changes), quiet=True).run_dir
    assert json.loads((run_dir / "audit.json").read_text())["ok"]
    return read_model(run_dir / "checkpoints/last")


def test_a_run_with_kept_tokens_ends_with_the_bits_of_one_that_computes_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mtl")
    kept = _run(tmp_path / "kept", "ram")
    assert [message for message in caplog.messages if "computed once" in message].__len__() == 2
    computed = _run(tmp_path / "computed", "off")
    assert kept.keys() == computed.keys() and all(torch.equal(kept[name], computed[name]) for name in kept)


def test_bins_that_cannot_give_the_mean_depth_are_refused_at_their_key(tmp_path: Path) -> None:
    head = {"name": "bins", "options": {"max": 0.2}}
    phases = [{"name": "a", "freeze": ["trunk"], "epochs": 1}]
    message = r"tiny\.yaml:\d+: tasks\.depth\.head: bins from -2.303 to -1.609 cannot give the task's best constant"
    with pytest.raises(ConfigError, match=message):
        tiny_parts(tmp_path, tasks={"depth": {"type": "depth", "head": head}}, phases=phases)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trunk", "size", "precision", "optim"),
    [
        ("test_resnet", 64, "fp32", {}),
        ("test_vit", 32, "fp32", {}),
        ("test_vit", 32, "bf16", {"optimizer": "sgd", "weight_decay": 0.0, "lr": 0.1}),
    ],
)
def test_a_run_with_every_head_passes_the_audit(
    trunk: str, size: int, precision: str, optim: dict[str, Any], tmp_path: Path
) -> None:
    tasks: dict[str, dict[str, Any]] = {}
    for name, kind in HEADS.items():
        small = {"mlp": {"hidden": 8}, "bins": {"num_bins": 8}, "linear": {}, "attention_pool": {}, "linear_bn": {}}
        head = {"name": name, "options": small.get(name, {"width": 8})}
        dense = {"type": "depth", "label": "depth", "head": head}
        vector = {"type": "classification", "num_classes": 10, "label": "object", "head": head}
        tasks[name] = dense if kind.output == "dense" else vector
    setup = tiny_parts(
        tmp_path,
        f"precision={precision}",
        trunk={"name": trunk},
        tasks=tasks,
        balance={"method": "mean"},
        optim=optim,
        data={"name": "scenes", "image_size": size, "batch_size": 8, "num_train": 40, "num_val": 8},
        phases=[{"name": "kept", "freeze": ["trunk"], "epochs": 2, "cache": "ram"}, {"name": "all", "epochs": 1}],
    )
    audit = json.loads((train(setup, quiet=True).run_dir / "audit.json").read_text())
    assert audit["ok"] and not any(phase["hazards"] for phase in audit["phases"])


@pytest.mark.slow
def test_the_decoders_of_the_extra_are_imported_only_by_a_head_that_needs_them() -> None:
    code = "import sys, mtl.model; sys.exit('segmentation_models_pytorch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
