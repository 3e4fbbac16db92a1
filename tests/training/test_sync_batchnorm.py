"""BatchNorm over the images of all processes is BatchNorm over one batch of them, forward and backward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from distributed_runs import EQUAL, command, finish, surroundings
from mtl.distributed.sync_batchnorm import synchronise
from mtl.distributed.world import World
from mtl.training.run import train
from processes import run_in_processes
from runs import read_model, tiny_parts
from test_distributed_run import assert_close, largest_difference

SCRIPT = """
import copy, json, os, sys
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import nn
from torch.utils.checkpoint import checkpoint
from mtl.distributed.world import World
from mtl.distributed.sync_batchnorm import synchronise

dist.init_process_group("gloo")
world = World(dist.get_rank(), dist.get_world_size(), dist.get_rank())
found = {}
kinds = {
    "2d": (lambda: nn.BatchNorm2d(5), (3, 4)),
    "1d": (lambda: nn.BatchNorm1d(5), ()),
    "with activation": (lambda: BatchNormAct2d(5), (3, 4)),
    "without affine": (lambda: nn.BatchNorm2d(5, affine=False), (2, 2)),
    "without memory": (lambda: nn.BatchNorm2d(5, track_running_stats=False), (2, 2)),
    "of all batches": (lambda: nn.BatchNorm2d(5, momentum=None), (2, 2)),
}
for name, (make, shape) in kinds.items():
    for recomputed in (False, True):
        torch.manual_seed(0)
        # The mean is far from zero, and no share is of the same size as another.
        x = (torch.randn(7, 5, *shape, dtype=torch.float64) + 1e4).tensor_split(world.size)
        own = x[world.rank].clone().requires_grad_()
        every = torch.cat(x).requires_grad_()
        model = nn.Sequential(make(), nn.Flatten(), nn.LazyLinear(3)).double()
        model(every.detach())
        whole = copy.deepcopy(model)
        synchronise(model, world)
        assert type(model[0]) is type(whole[0])
        weights = torch.randn(7, 3, dtype=torch.float64)
        for _ in range(2):
            out = checkpoint(model, own, use_reentrant=False) if recomputed else model(own)
            (out.tanh() * weights.tensor_split(world.size)[world.rank]).sum().backward()
            (whole(every).tanh() * weights).sum().backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        pairs = [(own.grad, every.grad.tensor_split(world.size)[world.rank])]
        pairs += [(p.grad, q.grad) for p, q in zip(model.parameters(), whole.parameters())]
        if not recomputed:  # statistics would move twice
            pairs += [(p.double(), q.double()) for p, q in zip(model.buffers(), whole.buffers())]
        found[f"{name}, recomputed {recomputed}"] = max(
            float(((p - q).abs() / q.abs().max().clamp_min(1e-3)).max()) for p, q in pairs
        )
torch.manual_seed(world.rank)
norm = nn.BatchNorm2d(5)
synchronise(norm, world)
norm(torch.randn(2 + world.rank, 5, 4, 4).bfloat16())
found["running_mean"] = norm.running_mean.tolist()
with open(f"{sys.argv[1]}/{world.rank}.json", "w") as file:
    json.dump(found, file)
dist.barrier()
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 3])
def test_shares_of_a_batch_have_outputs_gradients_and_statistics_of_the_whole(tmp_path: Path, number: int) -> None:
    run_in_processes(SCRIPT, tmp_path, number)
    ranks: list[dict[str, Any]] = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(number)]
    means = [rank.pop("running_mean") for rank in ranks]
    assert all(mean == means[0] for mean in means), "statistics are the same in every bit"
    assert all(len(rank) == 12 for rank in ranks)
    for rank in ranks:
        for name, difference in rank.items():
            assert difference < 1e-9, name


def test_alone_nothing_is_changed_and_classes_stay_what_patterns_select() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), BatchNormAct2d(4))
    synchronise(model, World.alone())
    assert all("forward" not in vars(norm) for norm in model)
    synchronise(model, World(0, 2, 0))
    assert [type(norm) for norm in model] == [nn.BatchNorm2d, BatchNormAct2d]
    # In eval mode no other process is asked: there is none here.
    model.eval()
    assert torch.equal(model(torch.ones(1, 4, 2, 2)), model(torch.ones(1, 4, 2, 2)))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "strategy", "method"), [(2, "ddp", "mgda"), (3, "ddp", "uw"), (2, "fsdp2", "uw")])
def test_processes_train_batchnorm_as_one_does(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, number: int, strategy: str, method: str
) -> None:
    # Under Adam, the first step is as long for a gradient that is nothing but rounding.
    sgd = {"optimizer": {"name": "sgd", "options": {"momentum": 0.9}}, "lr": 1e-2}
    phases = [
        {"name": "half", "freeze": ["trunk@first:50%"], "epochs": 1, **sgd},
        {"name": "all", "steps": 4, "balance": method, **sgd},
    ]
    changes: dict[str, Any] = {
        "trunk": {"name": "test_resnet", "checkpointing": True},
        "freeze_always": [],
        "optim": {"ema_decay": 0.9, "clip_norm": 1.0},
        "audit": {"gradients_every_steps": 2},
        "phases": phases,
    }
    monkeypatch.setenv("MTL_CACHE_DIR", str(cache_dir))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    several, alone = tmp_path / "several", tmp_path / "one"
    several.mkdir()
    alone.mkdir()
    one = train(tiny_parts(alone, **{**EQUAL, **changes}), quiet=True).run_dir
    whole = command(number, several, "distributed.sync_batchnorm=true", f"distributed.strategy={strategy}", **changes)
    code, said = finish(whole, surroundings(cache_dir) | {"WANDB_MODE": "disabled"})
    assert code == 0, said[-4000:]
    # Normalising what is nearly constant makes rounding larger. Without the key, the first loss differs by 1.4e-3.
    assert_close(several / "runs/tiny", one, loss=1e-4)
    weights = [read_model(run_dir / "checkpoints/last") for run_dir in (several / "runs/tiny", one)]
    assert largest_difference(*weights) < 1e-4
