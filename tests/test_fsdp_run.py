"""A run whose model is spread over two processes is that of one process, and each goes on where the other stopped."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import fsdp_run_script
from mtl.assembly import assemble
from mtl.audit.cold import audit_run
from mtl.config import load_config
from mtl.config.source import ConfigError
from mtl.distributed import World
from mtl.fsdp import dcp_to_plain
from mtl.run import train
from processes import run_in_processes
from runs import read_metrics, read_model

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


def write_config(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / "config.yaml"
    data = CONFIG["data"] | {"cache_dir": str(folder.parent / "data")}
    content = CONFIG | {"runs_dir": str(folder / "runs"), "data": data} | changes
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def run(folder: Path, number: int, *overrides: str, **order: Any) -> list[dict[str, Any]]:
    """Trains the folder's configuration in so many processes; returns what each has found."""
    arguments = [str(folder / "config.yaml"), *overrides]
    (folder / "order.json").write_text(json.dumps({"arguments": arguments, **order}))
    run_in_processes(Path(fsdp_run_script.__file__).read_text(), folder, number)
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
    assert list(one) == list(other)
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-5, atol=1e-6, msg=name)
    memory, wanted = (load_file(each / "checkpoints/last/optimizer.safetensors") for each in (got, expected))
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


def test_a_run_of_two_processes_is_that_of_one_with_half_of_the_parameters_each(tmp_path: Path) -> None:
    expected = run_alone(tmp_path / "one")
    write_config(tmp_path / "two")
    found = run(tmp_path / "two", 2, SPREAD, dcp_at=NUM_STEPS)
    run_dir = tmp_path / "two/runs/run"
    check_same(run_dir, expected)
    for each in found:
        assert each["frozen with a gradient"] == each["trained without"] == []
        assert each["here"] < 0.6 * each["all"]
    # The checkpoint's model is the averages; the weights as they train are beside it.
    memory = load_file(run_dir / "checkpoints/last/optimizer.safetensors")
    plain = dcp_to_plain(tmp_path / "two/dcp")
    trained = {name.removeprefix("live/"): each for name, each in memory.items() if name.startswith("live/")}
    assert len(trained) > 50 and all(torch.equal(plain[name], each) for name, each in trained.items())
    assert (run_dir / "report.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize("die_at", [2, 4, 8], ids=["in the first phase", "in the second", "behind the best weights"])
def test_a_killed_run_goes_on_spread_alone_and_with_ddp(die_at: int, tmp_path: Path) -> None:
    expected = run_alone(tmp_path / "one")
    write_config(tmp_path / "killed")
    with pytest.raises(subprocess.CalledProcessError):
        run(tmp_path / "killed", 2, SPREAD, die_at=die_at)
    last = tmp_path / "killed/runs/run/checkpoints/last/state.json"
    assert json.loads(last.read_text())["step"] == die_at - 1
    for name, number, strategy in (("spread", 2, "fsdp2"), ("alone", 1, "ddp"), ("ddp", 2, "ddp")):
        shutil.copytree(tmp_path / "killed/runs", tmp_path / name / "runs", symlinks=True)
        write_config(tmp_path / name)
        run(tmp_path / name, number, "resume=auto", f"distributed.strategy={strategy}")
        check_same(tmp_path / name / "runs/run", expected)


@pytest.mark.slow
@pytest.mark.parametrize("die_at", [2, 8])
def test_a_killed_run_of_one_process_goes_on_spread(die_at: int, tmp_path: Path) -> None:
    expected = run_alone(tmp_path / "one")
    write_config(tmp_path / "killed")
    with pytest.raises(subprocess.CalledProcessError):
        run(tmp_path / "killed", 1, die_at=die_at)
    run(tmp_path / "killed", 2, "resume=auto", SPREAD)
    check_same(tmp_path / "killed/runs/run", expected)


@pytest.mark.slow
def test_half_precision_and_recomputed_activations_go_with_it(tmp_path: Path) -> None:
    trunk = {"name": "test_vit", "weights": "none", "checkpointing": True}
    expected = run_alone(tmp_path / "one", precision="bf16", trunk=trunk)
    write_config(tmp_path / "two", precision="bf16", trunk=trunk)
    run(tmp_path / "two", 2, SPREAD)
    assert losses(tmp_path / "two/runs/run") == pytest.approx(losses(expected), rel=0.02)


@pytest.mark.slow
def test_norm_layers_that_train_have_the_same_statistics_in_all_processes(tmp_path: Path) -> None:
    phases = [{"name": "all", "epochs": 2}]
    write_config(tmp_path / "two", phases=phases, trunk={"name": "test_resnet", "weights": "none"})
    run(tmp_path / "two", 2, SPREAD)
    # The audit compares the statistics of all processes at the end of each epoch.
    (phase,) = json.loads((tmp_path / "two/runs/run/audit.json").read_text())["phases"]
    assert phase["ok"] and phase["violations"] == []


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ("memory_format=channels_last", "it spreads contiguous tensors only; expected contiguous, got channels_last"),
        ("precision=fp16", "losses are not scaled for spread gradients; expected fp32 or bf16, got fp16"),
        ("compile=true", "compiled code does not gather what is spread; expected false, got True"),
    ],
)
def test_what_does_not_go_with_it_is_refused(setting: str, why: str, tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path / "run"), [SPREAD, setting])
    with pytest.raises(ConfigError, match=f"{setting.split('=')[0]}: with distributed.strategy=fsdp2 {why}"):
        assemble(config, quiet=True, world=World(0, 2, 0))
