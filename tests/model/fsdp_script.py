"""What `test_fsdp` runs in several processes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from mtl.checkpoint.folder import Checkpoints
from mtl.checkpoint.load import load_checkpoint
from mtl.config import TrunkConfig
from mtl.distributed.world import World
from mtl.model import MultiTaskModel
from mtl.model.fsdp import gather_model, shard
from mtl.optim.optimizer_state import OptimizerState
from mtl.runtime.tensors import gathered
from mtl.tasks import Classification, Depth, Task

WORLD = World.from_environment()
NAMES = ("test_resnet", "test_vit")
TASKS: dict[str, Task] = {"object": Classification(5), "depth": Depth()}
IMAGES = torch.randint(0, 256, (6, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
LABELS = {
    "object": torch.arange(6) % 5,
    "depth": 1 + torch.rand(6, 1, 32, 32, generator=torch.Generator().manual_seed(2)),
}


def build(name: str) -> MultiTaskModel:
    torch.manual_seed(0)
    options = {"img_size": 32} if "vit" in name else {}
    model = MultiTaskModel(TrunkConfig(name=name, weights="none", options=options), TASKS, 32)
    return model.eval()  # statistics of a share are others than those of a batch


def freeze(model: MultiTaskModel, starts: tuple[str, ...]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(starts))


def train(model: MultiTaskModel, optimizer: AdamW, indices: Tensor, world: World, num_steps: int = 2) -> list[float]:
    losses = []
    for _ in range(num_steps):
        outputs = model.decode(model.encode(IMAGES[indices]), (32, 32))
        loss = sum((TASKS[name].loss(outputs[name], LABELS[name][indices]) for name in TASKS), torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(world.mean(loss)))
    return losses


def optimizer_of(model: nn.Module) -> AdamW:
    return AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, eps=1e-2)


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def save(folder: Path, model: MultiTaskModel, optimizer: AdamW, starts: tuple[str, ...]) -> None:
    """Two checkpoints in shards, and a plain one as the second, with some tensors as if they were frozen."""
    frozen, moments = [name for name in model.state_dict() if name.startswith(starts)], OptimizerState()
    moments.collect(optimizer, {p: n for n, p in model.named_parameters()})
    # What is not sharded, of a type that is kept as bytes, and of no axis and no elements.
    odd = {"complex": torch.ones(2, dtype=torch.complex128), "none": torch.empty(0, 3), "step": torch.tensor(3)}
    memory = {"moments": moments.state_dict(), "odd": odd}
    with patch.object(DTensor, "full_tensor", side_effect=AssertionError("a whole tensor was asked for")):
        for step in (1, 2):
            Checkpoints(folder / "shards").save_shards(model, frozen, memory, {"step": step}, ["last"], WORLD)
    whole, memory = gather_model(model, WORLD), gathered(memory, WORLD.is_main)
    if WORLD.is_main:
        Checkpoints(folder / "plain").save(whole, frozen, memory, {"step": 2}, ["last"])
    WORLD.barrier()


def check(name: str, first: str, folder: Path) -> dict[str, Any]:
    """Three phases of a sharded model and of a plain one, with the second phase saved and loaded by another model."""
    plain, sharded = build(name), build(name)
    shard(sharded, WORLD)
    everything = torch.arange(len(IMAGES))
    mine = WORLD.shares(everything)[WORLD.rank]
    found: dict[str, Any] = {
        "local": sum(p.to_local().numel() for p in sharded.parameters() if isinstance(p, DTensor)),
        "all": sum(p.numel() for p in plain.parameters()),
        "names": [n for n, _ in sharded.named_parameters()] == [n for n, _ in plain.named_parameters()],
        "losses": {},
    }
    for phase, frozen in {"heads": ("trunk",), "half": (first, "heads.object"), "all": ("none",)}.items():
        freeze(plain, frozen)
        freeze(sharded, frozen)
        held = {n: p for n, p in sharded.named_parameters() if not p.requires_grad}
        bytes_before = {n: p.to_local().clone() for n, p in held.items()}
        for p in sharded.parameters():
            p.grad = None
        optimizer = optimizer_of(sharded)
        got = train(sharded, optimizer, mine, WORLD)
        expected = train(plain, optimizer_of(plain), everything, World.alone())
        found["losses"][phase] = [got, expected]
        still = all(torch.equal(p.to_local(), bytes_before[n]) and p.grad is None for n, p in held.items())
        found[f"{phase} still"] = (still and len(held) > 0) or phase == "all"
        found[f"{phase} moved"] = all(p.grad is not None for p in sharded.parameters() if p.requires_grad)
        found[f"{phase} sharded"] = all(isinstance(p, DTensor) for p in sharded.parameters())
    whole = gather_model(sharded, WORLD).state_dict()
    found["names on rank"] = len(whole)
    if WORLD.is_main:
        found["difference"] = difference(whole, gather_model(plain, World.alone()).state_dict())
    save(folder / name, sharded, optimizer, (first, "heads.object"))
    other = build(name)
    shard(other, WORLD)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    _, memory = load_checkpoint(folder / name / "shards/last", other)
    found["state sharded"] = all(
        isinstance(state["exp_avg"], DTensor) for kept in memory["moments"].values() for state in kept.values()
    )
    again, moments = optimizer_of(other), OptimizerState()
    moments.load_state_dict(memory["moments"])
    moments.apply(again, {p: n for n, p in other.named_parameters()})
    resumed = gather_model(other, WORLD).state_dict()
    if WORLD.is_main:
        found["resumed"] = difference(resumed, whole)
    freeze(other, ("none",))
    found["continue"] = [train(m, o, mine, WORLD) for m, o in ((sharded, optimizer), (other, again))]
    return found


if __name__ == "__main__":
    WORLD.start(torch.device("cpu"), timeout_s=600)
    folder = Path(sys.argv[1])
    everything = {
        name: check(name, first, folder)
        for name, first in {"test_resnet": "trunk.layer1", "test_vit": "trunk.blocks.0"}.items()
        if name in NAMES
    }
    (folder / f"{WORLD.rank}.json").write_text(json.dumps(everything))
    WORLD.barrier()
    os._exit(0)
