"""Do the processes of a run hold the same tensors? Two and three of gloo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from mtl.audit import GradientAudit, found_anywhere
from mtl.audit.watch.ranks import differences
from processes import run_in_processes

SCRIPT = """
import json, os, sys, torch
from torch import nn
import torch.distributed as dist
from torch.optim import SGD
from mtl.audit import AuditError, GradientAudit, found_anywhere

dist.init_process_group("gloo")
rank, number = dist.get_rank(), dist.get_world_size()

def write(tensor):
    with torch.no_grad():
        tensor.view(-1)[0] += 1

def at_the_last(fault):
    return lambda model: fault(model) if rank == number - 1 else None

plants = {
    "nothing": lambda model: None,
    "a weight that trains": at_the_last(lambda model: write(model.head.weight)),
    "a frozen buffer": at_the_last(lambda model: write(model.trunk[1].running_mean)),
    "statistics of what is trained": lambda model: model.norm.running_mean.add_(rank),
    "a tensor more": at_the_last(lambda model: model.head.register_parameter("extra", nn.Parameter(torch.ones(1)))),
    "another type": at_the_last(lambda model: model.head.double()),
    "all apart": lambda model: model.head.bias.data.add_(rank),
}
early = ("a frozen buffer", "a tensor more")
found = {}
for plant, fault in plants.items():
    for policy in ("collect", "raise"):
        torch.manual_seed(0)
        model = nn.Sequential()
        model.trunk = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        model.norm = nn.BatchNorm1d(3)
        model.head = nn.Linear(3, 1)
        model.trunk.requires_grad_(False).eval()
        if plant in early:
            fault(model)  # before the phase: each rank for itself has nothing to find
        optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        audit = GradientAudit(model, ["trunk"], [optimizer], policy=policy)
        audit.begin("together")
        try:
            for step in range(3):
                audit.agree()
                model(torch.ones(4, 2)).sum().backward()
                audit.after_backward()
                optimizer.step()
                audit.after_step()
                optimizer.zero_grad()
                if step == 1 and plant not in early:
                    fault(model)
                    break
            audit.agree()
            audit.agree()
            audit.agree(buffers=True)
            raised = False
        except AuditError:
            raised = True
        key = plant if policy == "collect" else f"{plant}, raise"
        names = [[v.kind, v.name, v.step, v.since, v.detail, v.cause] for v in audit.report.violations]
        found[key] = [raised, names]
        found[f"{key}, patterns"] = {v.name: v.pattern for v in audit.report.violations}
found["flags"] = [found_anywhere(rank == 1), found_anywhere(False)]
with open(f"{sys.argv[1]}/{rank}.json", "w") as file:
    json.dump(found, file)
dist.barrier()
os._exit(0)
"""


def reports(folder: Path, number: int) -> dict[str, Any]:
    """What all ranks found, which is the same on each."""
    run_in_processes(SCRIPT, folder, number)
    found: list[dict[str, Any]] = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(number)]
    assert all(each == found[0] for each in found)
    return found[0]


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return reports(tmp_path_factory.mktemp("two"), 2)


def test_ranks_that_agree_are_silent(of_two: dict[str, Any]) -> None:
    assert of_two["nothing"] == of_two["nothing, raise"] == [False, []]


def test_a_weight_written_on_one_rank_is_named_with_that_rank_on_every_rank(of_two: dict[str, Any]) -> None:
    raised, [[kind, name, step, since, detail, cause]] = of_two["a weight that trains"]
    assert (raised, kind, name, step, since) == (False, "ranks_differ", "head.weight", 2, 1)
    assert detail == "rank 1 of 2 has other bytes than rank 0"
    assert "gradients were not averaged" in cause


def test_frozen_weights_that_were_others_from_the_beginning_are_named_at_the_first_look(of_two: dict[str, Any]) -> None:
    # The head on top of it comes apart a step later.
    _, [[kind, name, step, since, detail, cause], *_] = of_two["a frozen buffer"]
    assert (kind, name, step, since) == ("ranks_differ", "trunk.1.running_mean", 0, 0)
    assert detail == "rank 1 of 2 has other bytes than rank 0"
    assert "load the same on all before the freeze" in cause
    patterns = of_two["a frozen buffer, patterns"]
    assert patterns.pop("trunk.1.running_mean") == "'trunk'" and set(patterns.values()) <= {None}


@pytest.mark.parametrize("plant", ["a weight that trains", "a frozen buffer", "a tensor more", "another type"])
def test_the_policy_raise_raises_on_all_ranks(of_two: dict[str, Any], plant: str) -> None:
    assert of_two[f"{plant}, raise"][0]


def test_statistics_of_what_is_trained_are_compared_only_if_asked_for(of_two: dict[str, Any]) -> None:
    # Two looks found nothing wrong; the third was for buffers as well.
    assert [each[:2] for each in of_two["statistics of what is trained"][1]] == [["ranks_differ", "norm.running_mean"]]


def test_a_tensor_that_one_rank_has_alone_and_one_of_another_type_are_reported_as_such(of_two: dict[str, Any]) -> None:
    details = {each[1]: each[4] for each in of_two["a tensor more"][1]}
    assert details == {"head.extra": "rank 1 of 2 has a tensor here, unlike rank 0"}
    details = {each[1]: each[4] for each in of_two["another type"][1]}
    one = "rank 1 of 2 has torch.float64 (1, 3) in place of the torch.float32 (1, 3) of rank 0"
    assert details.keys() == {"head.weight", "head.bias"} and details["head.weight"] == one


def test_a_flag_of_one_rank_reaches_all(of_two: dict[str, Any]) -> None:
    assert of_two["flags"] == [True, False]


@pytest.mark.slow
def test_of_three_ranks_the_one_that_stands_apart_from_the_others_is_named(tmp_path: Path) -> None:
    found = reports(tmp_path, 3)
    assert found["nothing"] == [False, []]
    [[_, name, *_, detail, _]] = found["a weight that trains"][1]
    assert (name, detail) == ("head.weight", "rank 2 of 3 has other bytes than the other ranks")
    [[_, name, *_, detail, _]] = found["all apart"][1]
    assert (name, detail) == ("head.bias", "ranks 1, 2 of 3 have other bytes than rank 0")
    assert found["a frozen buffer, raise"][0] and found["flags"] == [True, False]


SPREAD = """
import json, os, sys, torch
from torch import nn
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from mtl.audit import GradientAudit

dist.init_process_group("gloo")
rank, mesh = dist.get_rank(), dist.init_device_mesh("cpu", (2,))
torch.manual_seed(0)
model = nn.Sequential()
model.trunk, model.head, model.whole = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)
model.trunk.requires_grad_(False)
fully_shard(model.trunk, mesh=mesh)
fully_shard(model.head, mesh=mesh)
model.whole.weight = nn.Parameter(distribute_tensor(model.whole.weight, mesh, [Replicate()]))
audit = GradientAudit(model, ["trunk"], policy="collect")
found = []
with audit.phase("spread") as record:
    audit.agree()
    found.append(len(record.violations))
    with torch.no_grad():
        model.whole.weight.to_local()[0, 0] += rank
    audit.agree()
    found.append([v.name for v in record.violations])
with open(f"{sys.argv[1]}/{rank}.json", "w") as file:
    json.dump(found, file)
dist.barrier()
os._exit(0)
"""


@pytest.mark.slow
def test_of_tensors_that_are_spread_only_replicated_ones_are_compared(tmp_path: Path) -> None:
    run_in_processes(SPREAD, tmp_path, 2)
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [0, ["whole.weight"]]


def test_without_other_processes_nothing_is_compared() -> None:
    model = nn.Linear(1, 1)
    audit = GradientAudit(model, ["weight"])
    model.weight.requires_grad_(False)
    with audit.phase("alone"):
        audit.agree()
        audit.agree(buffers=True)
    assert audit.report.ok
    assert found_anywhere(True) and not found_anywhere(False)
    with pytest.raises(RuntimeError, match="no phase is open"):
        audit.agree()


@pytest.mark.parametrize(
    ("held", "detail"),
    [
        (["f|1", "f|2", "f|1"], "rank 1 of 3 has other bytes than the other ranks"),
        (["f|2", "f|1", "f|1"], "rank 0 of 3 has other bytes than the other ranks"),
        (["f|1", "f|1", "f|2", "f|2"], "ranks 2, 3 of 4 have other bytes than rank 0"),
        (["f|1", "g|", None, "f|1", "f|1"], "rank 1 of 5 has g in place of the f of the other ranks; "
         "rank 2 of 5 has no such tensor, unlike the other ranks"),
    ],
)  # fmt: skip
def test_a_rank_that_differs_is_named_against_most_ranks_or_rank_0(held: list[str | None], detail: str) -> None:
    digests = [{"same": "f|0"} | ({} if each is None else {"name": each}) for each in held]
    assert [(each.name, each.detail) for each in differences(digests, is_frozen=False)] == [("name", detail)]
