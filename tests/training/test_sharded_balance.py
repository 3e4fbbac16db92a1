"""Methods that look at gradients, of a model sharded over processes: the steps of one process, and its memory."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fsdp_runs import DCP, SPREAD, losses, run, run_alone, write_config
from mtl.audit.offline.run import audit_run
from mtl.config import ConfigError, load_config
from mtl.distributed.world import World
from mtl.optim.balance.task_weights import TaskWeights
from mtl.phases.setup import build_model_setup
from mtl.training.setup import _check_processes
from processes import run_in_processes
from runs import read_memory, read_model

FROZEN = "type:BatchNorm2d"


def phase(balance: Any, *freeze: str, steps: int = 2) -> dict[str, Any]:
    name = "-".join(freeze) or "all"
    return {"name": name.replace(".", "_"), "balance": balance, "freeze": [*freeze, FROZEN], "steps": steps}


# Where methods look, and what they remember, through parts of the trunk that freeze and thaw.
PHASES = [
    phase("dbmtl", "trunk.patch_embed", "trunk.blocks.0"),
    phase({"method": "cagrad", "options": {"c": 0.5}, "on": "features"}, "heads.object"),
    phase({"method": "gradnorm", "options": {"warmup_steps": 1, "lr": 0.2}, "on": {"layer": "trunk.blocks.1.mlp"}}),
    phase("moco", "heads"),
]


def rows_of(value: dict[str, Tensor], key: str) -> Tensor:
    """What a method remembers of rows: whole in a checkpoint of one process, by parameter in one of shards."""
    if key in value:
        return value[key]
    places = sorted((int(name.rpartition("/")[2]), name) for name in value if name.rpartition("/")[0] == key)
    return torch.cat([value[name].flatten(1) for _, name in places], dim=1)


def check_same(got: Path, expected: Path, rel: float = 1e-4) -> None:
    """The same run but for the order in which sums were rounded; also what the methods remember."""
    assert losses(got) == pytest.approx(losses(expected), rel=rel)
    one, other = read_model(got / "checkpoints/last"), read_model(expected / "checkpoints/last")
    for name, tensor in other.items():
        torch.testing.assert_close(one[name], tensor, rtol=rel, atol=1e-5, msg=name)
    memory, wanted = (read_memory(each / "checkpoints/last") for each in (got, expected))
    for name, tensor in wanted.items():
        if name.startswith("balance/"):
            atol = 1e-3 * float(tensor.abs().max())
            torch.testing.assert_close(rows_of(memory, name), tensor, rtol=1e-3, atol=atol, msg=name)
    assert audit_run(got).findings == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 3])
def test_in_shards_a_method_takes_the_steps_of_one_process_wherever_it_looks(tmp_path: Path, number: int) -> None:
    expected = run_alone(tmp_path / "one", phases=PHASES, optim={"clip_norm": 1.0, "optimizer": "sgd", "lr": 0.01})
    write_config(tmp_path / "many", phases=PHASES, optim={"clip_norm": 1.0, "optimizer": "sgd", "lr": 0.01})
    for found in run(tmp_path / "many", number, SPREAD):
        assert found["frozen with a gradient"] == found["trained without"] == []
        assert found["here"] < 0.6 * found["all"]
    check_same(tmp_path / "many/runs/run", expected)


@pytest.mark.slow
def test_half_precision_and_recomputed_activations_go_with_it(tmp_path: Path) -> None:
    own: dict[str, Any] = {"trunk": {"name": "test_vit", "weights": "none", "checkpointing": True}}
    own |= {"precision": "bf16", "phases": PHASES, "optim": {"optimizer": "sgd", "lr": 0.01}}
    expected = run_alone(tmp_path / "one", **own)
    write_config(tmp_path / "two", **own)
    run(tmp_path / "two", 2, SPREAD)
    assert losses(tmp_path / "two/runs/run") == pytest.approx(losses(expected), rel=0.03)


AGAIN = {"alone": (1, "ddp"), "ddp": (2, "ddp"), "three": (3, "fsdp2")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "shards", "other"),
    [
        ("dbmtl", [], "alone"),
        ("excessmtl", [DCP], "three"),
        ("moco", [DCP], "alone"),
        ("excessmtl", [], "ddp"),
    ],
)
def test_what_a_method_remembers_survives_a_kill_with_any_number_of_processes(
    tmp_path: Path, method: str, shards: list[str], other: str
) -> None:
    changes: dict[str, Any] = {
        "phases": [phase(method, "trunk.patch_embed", steps=4), phase(method, steps=4)],
        "optim": {"optimizer": "sgd", "lr": 0.01},
        "audit": {"gradients_every_steps": 0},
        # Of every step, the memory of before is kept.
        "not_finite": "skip",
    }
    for name in ("whole", "killed"):
        write_config(tmp_path / name, **changes)
    run(tmp_path / "whole", 2, SPREAD, *shards)
    with pytest.raises(subprocess.CalledProcessError):
        run(tmp_path / "killed", 2, SPREAD, *shards, die_at=7)
    for name, (number, strategy) in {"spread": (2, "fsdp2"), other: AGAIN[other]}.items():
        shutil.copytree(tmp_path / "killed/runs", tmp_path / name / "runs", symlinks=True)
        write_config(tmp_path / name, **changes)
        own = shards if strategy == "fsdp2" else []
        run(tmp_path / name, number, "resume=auto", f"distributed.strategy={strategy}", *own)
    expected = tmp_path / "whole/runs/run"
    assert losses(tmp_path / other / "runs/run") == pytest.approx(losses(expected), rel=1e-4)
    # As many processes: the same bits.
    read = [{**read_model(each), **read_memory(each)} for each in _last(tmp_path, "spread", "whole")]
    assert read[0].keys() == read[1].keys() and any("/mean/0" in name or "/squares/0" in name for name in read[0])
    assert [name for name, tensor in read[0].items() if not torch.equal(tensor, read[1][name])] == []


def _last(folder: Path, *names: str) -> list[Path]:
    return [folder / name / "runs/run/checkpoints/last" for name in names]


@pytest.mark.slow
def test_a_run_of_one_process_that_remembers_rows_continues_in_shards(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"phases": [phase("dbmtl", steps=8)], "optim": {"optimizer": "sgd", "lr": 0.01}}
    expected = run_alone(tmp_path / "one", **changes)
    write_config(tmp_path / "killed", **changes)
    with pytest.raises(subprocess.CalledProcessError):
        run(tmp_path / "killed", 1, die_at=5)
    run(tmp_path / "killed", 2, "resume=auto", SPREAD)
    check_same(tmp_path / "killed/runs/run", expected)


class Own(TaskWeights):
    def weights(self, losses: Tensor, rows: Tensor) -> Tensor:
        return losses / (rows @ rows.T).diagonal().sqrt()


@pytest.mark.parametrize("of_phase", [False, True])
def test_a_method_of_ones_own_that_is_given_whole_gradients_is_refused(tmp_path: Path, of_phase: bool) -> None:
    name = f"{__name__}:Own"
    phases = [{"name": "a", "epochs": 1, **({"balance": name} if of_phase else {})}]
    file = write_config(tmp_path / "run", balance="mean" if of_phase else name, phases=phases)
    key = r"phases\.(0|a)\.balance\.method" if of_phase else r"balance\.method"
    with pytest.raises(ConfigError, match=rf"config\.yaml:\d+: {key}: .*fsdp2 .*expected a Weighting .*, got Own"):
        _check_processes(build_model_setup(load_config(file, [SPREAD])), World(0, 2, 0))


SPLIT = """
import json, sys
from pathlib import Path
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from mtl.distributed.world import World
from mtl.optim.balance.gradient_method import TaskGradients
from mtl.optim.balance.row_shards import RowShards, row_of
from mtl.optim.balance.subset import Subset
from mtl.optim.balance.task_memory import TaskMemory
from mtl.runtime.tensors import full_tensor

world = World.from_environment()
world.start(torch.device("cpu"))
module = nn.ParameterList([nn.Parameter(torch.zeros(shape)) for shape in [(5, 3), (1,), (2, 2, 2), (7,), (3, 1)]])
fully_shard(module, mesh=init_device_mesh("cpu", (world.size,)))
shards = RowShards(world, list(module))
whole = torch.arange(2.0 * shards.size).reshape(2, -1) / 7
here = shards.here(whole)
gathered = [full_tensor(each) for each in shards.by_parameter(here)]
assert [each.shape[1:] for each in gathered] == [each.shape for each in module]
memory, names = TaskMemory(2), Subset((0, 1), 2)
one, other = RowShards(world, list(module)[:2]), shards
for split in (one, other):
    before = memory.state()
    length = split.here(torch.zeros(2, split.size))
    memory.match(TaskGradients(length, torch.ones(2), rows_of=str(split.size), shards=split), ())
    memory.read("mean", names, length + 1)
    memory.write("mean", names, length + 2)
    after = memory.state()
    # A step that is left out, the first of other parameters too.
    memory.load_state(before)
    assert [tuple(each.shape) for each in memory.state().get("mean", [])] == [
        tuple(each.shape) for each in before.get("mean", [])
    ]
    memory.load_state(after)
    assert all(torch.equal(full_tensor(each), torch.full(each.shape, 2.0)) for each in memory.state()["mean"])
assert torch.equal(row_of(gathered), whole) and torch.equal(row_of(shards.by_parameter(here)), here)
apart, alone = TaskGradients(here, torch.ones(2), shards=shards), TaskGradients(whole, torch.ones(2))
torch.testing.assert_close(apart.products, alone.products, rtol=1e-12, atol=0)
torch.testing.assert_close(apart.norms, alone.norms, rtol=1e-12, atol=0)
torch.manual_seed(3)
drawn = apart.uniform()
torch.manual_seed(3)
assert torch.equal(drawn, shards.here(alone.uniform()))
every = [None] * world.size
torch.distributed.all_gather_object(every, here.shape[1])
if world.is_main:
    Path(sys.argv[1], "sizes.json").write_text(json.dumps(every))
world.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 3, 4])
def test_rows_are_split_as_the_parameters_are(tmp_path: Path, number: int) -> None:
    run_in_processes(SPLIT, tmp_path, number)
    sizes = json.loads((tmp_path / "sizes.json").read_text())
    assert sum(sizes) == 15 + 1 + 8 + 7 + 3 and len(set(sizes)) > 1
