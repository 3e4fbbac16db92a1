"""The audit where tensors are spread over processes: two of gloo, with FSDP2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from processes import run_in_two_processes

SCRIPT = """
import json, os, sys, torch
from torch import nn
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW
from mtl.audit import GradientAudit

dist.init_process_group("gloo")
rank, mesh = dist.get_rank(), dist.init_device_mesh("cpu", (2,))
found = {}
for plant in ("nothing", "a write to one shard", "a loss times zero"):
    torch.manual_seed(0)
    model = nn.Sequential()
    # Five rows, which two do not divide, and one row, which leaves the second process nothing.
    model.trunk = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 8))
    model.head = nn.Linear(8, 1)
    model.other = nn.Linear(1, 3)
    model.trunk.requires_grad_(False).eval()
    for part in (model.trunk, model.head, model.other):
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    audit = GradientAudit(model, ["trunk"], [optimizer], policy="collect")
    with audit.phase("spread"):
        for step in range(1, 9):
            torch.manual_seed(10 * step + rank)
            output = model(torch.randn(4, 6))
            if plant == "a loss times zero":
                output = output * 0
            output.square().mean().backward()
            audit.after_backward()
            optimizer.step()
            if plant == "a write to one shard" and step == 4 and rank == 1:
                model.trunk[0].weight.data.to_local()[0, 0] += 1
            audit.after_step()
            optimizer.zero_grad()
    record = audit.report.phases[0]
    found[plant] = [record.completed, len(record.fingerprints), record.num_trained]
    found[plant].append(sorted((v.kind, v.name, v.step) for v in record.violations))
with open(f"{sys.argv[1]}/{rank}.json", "w") as file:
    json.dump(found, file)
# All is written. At an ordinary exit, after the group was destroyed, some runs were aborted by a thread of gloo.
dist.barrier()
os._exit(0)
"""


@pytest.mark.slow
def test_each_process_audits_its_own_shards(tmp_path: Path) -> None:
    run_in_two_processes(SCRIPT, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    # Six parameters and three statistics are frozen; the second process has nothing of the head with one row.
    assert first["nothing"] == [True, 9, 4, []]
    assert second["nothing"] == [True, 9, 2, []]
    assert first["a write to one shard"][3] == []
    assert [found[:2] for found in second["a write to one shard"][3]] == [["param_changed", "trunk.0.weight"]]
    dead = ["head.weight", "head.bias", "other.weight", "other.bias"]
    assert first["a loss times zero"][3] == sorted(["never_received_grad", name, 8] for name in dead)
    assert second["a loss times zero"][3] == sorted(["never_received_grad", name, 8] for name in dead[2:])
