"""A run whose model is sharded over two processes is that of one process, and each resumes where the other stopped."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

import forks
from fsdp_runs import DCP, SPREAD, check_same, losses, run, run_alone, write_config
from mtl.audit.offline.run import audit_run
from mtl.config import ConfigError, load_config
from mtl.distributed.world import World
from mtl.training.setup import assemble
from processes import HANGS_S


@pytest.mark.slow
def test_a_run_of_two_processes_is_that_of_one_with_half_of_the_parameters_each(tmp_path: Path) -> None:
    expected = run_alone(tmp_path / "one")
    write_config(tmp_path / "two")
    # As a user starts them: torch's compiler, for one, is imported late.
    found = run(tmp_path / "two", 2, SPREAD, in_forks=False)
    run_dir = tmp_path / "two/runs/run"
    check_same(run_dir, expected)
    for each in found:
        assert each["frozen with a gradient"] == each["trained without"] == []
        assert each["here"] < 0.6 * each["all"]
    assert (run_dir / "report.html").exists()
    # With shards, the same bits; what reads checkpoints reads those.
    write_config(tmp_path / "shards")
    run(tmp_path / "shards", 2, SPREAD, DCP)
    in_shards = tmp_path / "shards/runs/run"
    last, plain = in_shards / "checkpoints/last", run_dir / "checkpoints/last"
    assert not list(in_shards.rglob("model.safetensors"))
    assert audit_run(in_shards).num_tensors == audit_run(run_dir).num_tensors and audit_run(in_shards).ok
    assert (in_shards / "report.html").exists()
    script = Path(__file__).parents[2] / "scripts/plain_checkpoint.py"
    forks.run([str(script), str(last), str(tmp_path / "converted")], timeout=HANGS_S, check=True)
    for file in plain.glob("*.safetensors"):
        assert (tmp_path / "converted" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.slow
@pytest.mark.parametrize("die_at", [2, 4, 8], ids=["in the first phase", "in the second", "after the best weights"])
def test_a_killed_run_resumes_sharded_alone_and_with_ddp(die_at: int, tmp_path: Path) -> None:
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
def test_a_killed_run_of_one_process_resumes_sharded(die_at: int, tmp_path: Path) -> None:
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
        ("memory_format=channels_last", "it shards contiguous tensors only; expected contiguous, got channels_last"),
        ("precision=fp16", "losses are not scaled for sharded gradients; expected fp32 or bf16, got fp16"),
        ("compile=true", "compiled code does not gather shards; expected false, got True"),
        ("join_heads=true", "each head is gathered by itself; expected false, got True"),
    ],
)
def test_what_does_not_go_with_it_is_refused(setting: str, why: str, tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path / "run"), [SPREAD, setting])
    with pytest.raises(ConfigError, match=f"{setting.split('=')[0]}: with distributed.strategy=fsdp2 {why}"):
        assemble(config, quiet=True, world=World(0, 2, 0))
