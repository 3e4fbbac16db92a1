"""What `test_distributed` runs in several processes: each writes what it found, by name."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtl.config import TrunkConfig
from mtl.data import MemorySplit
from mtl.distributed.ddp import wrap_ddp
from mtl.distributed.world import World
from mtl.model import MultiTaskModel
from mtl.tasks import Classification, Depth, MultiLabel, Normals, Segmentation, Task
from mtl.training.validation import validate
from traffic import count_traffic

WORLD = World.from_environment()


def messages() -> dict[str, Any]:
    rank = WORLD.rank
    flags = WORLD.all_reduce_flags(stop=rank == 1, seconds=1.5 + rank)
    losses = torch.tensor([1.0 + rank, 4.0], requires_grad=True)
    together = WORLD.global_losses(losses)
    (together**2).sum().backward()
    norm = nn.BatchNorm1d(2)
    norm.running_mean, norm.num_batches_tracked = torch.tensor([1.0 * rank, 3.0]), torch.tensor(7 + rank)
    WORLD.average_buffers(norm, ["running_mean", "num_batches_tracked"])
    return {
        "agreement": [flags.stop, flags.broken, flags.seconds],
        "losses": [together.tolist(), losses.grad.tolist() if losses.grad is not None else None],
        "buffers": [norm.running_mean.tolist(), int(norm.num_batches_tracked), norm.running_var.tolist()],
        "object": WORLD.broadcast({"é": [1, None]} if rank == 0 else None),
        "slice": WORLD.shares(torch.arange(7))[WORLD.rank].tolist(),
    }


def phases() -> dict[str, Any]:
    """Gradients, and the bytes that were averaged, in three phases of one module."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"trunk": nn.Linear(3, 4), "norm": nn.BatchNorm1d(4), "head": nn.Linear(4, 2)})
    found: dict[str, Any] = {}
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
    mine = x[WORLD.shares(torch.arange(len(x)))[WORLD.rank]]
    model.norm.eval()

    def loss(x: Tensor) -> Tensor:
        return model.head(model.norm(model.trunk(x)).tanh()).square().mean()

    old: list[nn.Parameter] = []
    for phase, frozen in {"all": [], "heads": ["trunk", "norm"], "thawed": ["norm", "head"]}.items():
        for name, part in model.items():
            part.requires_grad_(name not in frozen)
        for parameter in model.parameters():
            parameter.grad = None
        trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        replica = wrap_ddp(model, trainable, WORLD)
        traffic = count_traffic(replica)
        with replica.no_sync():
            replica(loss, mine).backward()
        before = traffic.num_bytes
        for parameter in model.parameters():
            parameter.grad = None
        replica(loss, mine).backward()
        expected = torch.autograd.grad(loss(x), [p for p in model.parameters() if p.requires_grad])
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        found[phase] = {
            "right": all(
                torch.allclose(g, e, atol=1e-7) for g, e in zip(grads, expected, strict=True) if g is not None
            ),
            "without": [name for name, p in model.named_parameters() if p.grad is None],
            "bytes": [before, traffic.num_bytes, sum(p.nbytes for p in model.parameters() if p.requires_grad)],
            "marks": [k for p in (*model.parameters(), *model.buffers()) for k in vars(p) if "ddp" in k],
        }
        replica.close()
        # Nothing of the phase is left: a backward gives each process the gradient of its own share.
        for parameter in model.parameters():
            parameter.grad = None
        loss(mine).backward()
        own = torch.autograd.grad(loss(mine), [p for p in model.parameters() if p.requires_grad])
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        found[phase]["own again"] = all(torch.equal(g, e) for g, e in zip(grads, own, strict=True) if g is not None)
        old += [p for p in model.parameters() if p.requires_grad]
        del replica
    gc.collect()
    return found


def validation(size: int = 4, number: int = 11) -> dict[str, Any]:
    """Three batches, the last one uneven: two processes run two rounds, and the second has nothing in the last."""
    generator = torch.Generator().manual_seed(2)
    tasks: dict[str, Task] = {
        "object": Classification(5),
        "segmentation": Segmentation(4),
        "depth": Depth(),
        "normals": Normals(),
        "tags": MultiLabel(3),
    }
    tasks["tags"].added = list(tasks["tags"].more_metrics.values())
    torch.manual_seed(3)
    model = MultiTaskModel(TrunkConfig(name="test_resnet", weights="none"), tasks, 32)
    side = (number, 32, 32)
    labels = {
        "object": torch.randint(0, 5, (number,), generator=generator),
        "segmentation": torch.randint(0, 4, side, generator=generator),
        "depth": 1 + torch.rand(number, 1, 32, 32, generator=generator),
        "normals": nn.functional.normalize(torch.randn(number, 3, 32, 32, generator=generator), dim=1),
        "tags": torch.randint(0, 2, (number, 3), generator=generator).float(),
    }
    labels["tags"][4, 1] = torch.nan
    labels["depth"][-1], labels["segmentation"][0] = 0, 255
    split = MemorySplit(torch.randint(0, 256, (number, 32, 32, 3), dtype=torch.uint8, generator=generator), labels)
    device, off = torch.device("cpu"), torch.autocast("cpu", enabled=False)
    num_batches = 0

    def encode(batch: Any, names: Any) -> Any:
        nonlocal num_batches
        num_batches += 1
        return model.encode(batch.images, names)

    scores = {}
    for name, world in {"one": World.alone(), "many": WORLD}.items():
        scores[name] = validate(model, tasks, split, size, device, off, encode, world)
        scores[name + " batches"], num_batches = num_batches, 0
    # Only one process sees a batch; the others add zeros.
    scores["few"] = validate(model, tasks, split, number, device, off, encode, WORLD)
    return scores


if __name__ == "__main__":
    WORLD.start(torch.device("cpu"), timeout_s=600)
    everything = {"messages": messages(), "phases": phases(), "validation": validation()}
    Path(sys.argv[1], f"{WORLD.rank}.json").write_text(json.dumps(everything))
    # At an ordinary exit, after the group was destroyed, some runs were aborted by a thread of gloo.
    WORLD.barrier()
    os._exit(0)
