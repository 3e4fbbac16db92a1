"""A run in several processes is the run of one: losses, metrics, weights; and it resumes from its checkpoints."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import wandb_file
from crashes import assert_same, results
from distributed_runs import EQUAL, ask_to_end, command, finish, surroundings
from mtl.training.run import train
from processes import HANGS_S, kill_all, started, wait_until
from runs import TINY, read_metrics, read_model, tiny_parts
from test_resume import PHASES

# Rounding alone: sums over shares are added in another order. FAMO steps its weights by Adam, for which the first
# steps are as long for a gradient that is nothing but rounding.
LOSS, COMBINED, WEIGHT = 1e-5, 2e-4, 1e-4
NUM_STEPS = {"heads": 6, "half": 8, "all": 4}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    """The run directory of one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTL_CACHE_DIR", str(cache_dir))
        patch.setenv("WANDB_MODE", "disabled")
        return train(tiny_parts(tmp_path_factory.mktemp("one"), **EQUAL), quiet=True).run_dir


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    """The folder of a run in two processes, which none has disturbed."""
    folder = tmp_path_factory.mktemp("two")
    code, said = finish(command(2, folder), surroundings(cache_dir, folder=folder))
    assert code == 0, said[-4000:]
    return folder


def assert_close(run_dir: Path, other: Path, first_step: int = 0, loss: float = LOSS) -> None:
    """Losses at every step and validation metrics, from a step on, are equal up to rounding."""
    rows = [row for row in map(judged, read_metrics(other)) if row["step"] > first_step and len(row) > 3]
    by_place = {(row["step"], "train/loss" in row): row for row in map(judged, read_metrics(run_dir)) if len(row) > 3}
    assert len(rows) > 3
    for row in rows:
        found = by_place[row["step"], "train/loss" in row]
        assert row.keys() == found.keys()
        for key, value in row.items():
            tolerance = COMBINED if key in ("train/loss", "val/score") else loss
            assert found[key] == (value if isinstance(value, str) else pytest.approx(value, rel=tolerance)), (row, key)


def judged(row: dict[str, Any]) -> dict[str, Any]:
    """What is to be the same in a row: no speeds, and no norms of the first process's own gradients."""
    left_out = ("perf/", "grad/", "audit/", "phase_number")
    return {key: value for key, value in row.items() if not key.startswith(left_out)}


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def assert_is_one_run(run_dir: Path) -> None:
    """Files are written once, and the audit is clean."""
    steps = [row["step"] for row in read_metrics(run_dir) if "train/lr" in row]
    assert steps == list(range(1, sum(NUM_STEPS.values()) + 1))
    audit = json.loads((run_dir / "audit.json").read_text())
    assert audit["ok"] and [phase["completed"] for phase in audit["phases"]] == [True] * 3
    assert not list(run_dir.glob("audit.rank-*"))


@pytest.mark.slow
def test_two_processes_train_what_one_does(one: Path, two: Path) -> None:
    run_dir = two / "runs/tiny"
    assert_close(run_dir, one)
    assert_is_one_run(run_dir)
    assert len(list((run_dir / "wandb").glob("offline-run-*"))) == 1
    assert len({row["train/loss"] for row in read_metrics(run_dir) if "train/loss" in row}) == 18
    weights = [read_model(folder / "checkpoints/last") for folder in (run_dir, one)]
    assert largest_difference(*weights) < WEIGHT


def test_predictions_are_shown_after_each_validation_though_features_are_kept_by_both(two: Path) -> None:
    run_dir = two / "runs/tiny"
    validated = [row["step"] for row in read_metrics(run_dir) if "val/score" in row]
    history = wandb_file.history(wandb_file.offline_file(run_dir))
    assert [row["_step"] for row in history if "val/predictions/path" in row] == validated


def test_what_is_sent_at_a_step_is_the_gradient_of_what_is_trained_in_the_phase(two: Path) -> None:
    ranks = [json.loads((two / f"{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    assert [phase["steps"] for phase in ranks[0]] == list(NUM_STEPS.values())
    for phase in ranks[0]:
        assert phase["sent"] == phase["steps"] * phase["trainable"]
    assert [phase["trainable"] for phase in ranks[0]] == sorted({phase["trainable"] for phase in ranks[0]})


def test_a_checkpoint_of_two_processes_is_resumed_by_one(
    tmp_path: Path, one: Path, two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mtl.config import load_config
    from mtl.training.resume import resumed_config
    from mtl.training.setup import assemble

    monkeypatch.setenv("WANDB_MODE", "disabled")
    at = two / "runs/tiny/checkpoints/step-00000010"
    config = load_config(two / "tiny.yaml", [f"resume={at}", "name=again", f"runs_dir={tmp_path}"])
    config, source = resumed_config(config)
    assert source is not None
    run_dir = train(assemble(config, quiet=True), quiet=True, source=source).run_dir
    assert_close(run_dir, one, first_step=10)
    assert min(row["step"] for row in read_metrics(run_dir)) == 11


@pytest.mark.slow
def test_torchrun_starts_a_run_again_of_which_a_process_was_killed_and_it_ends_with_the_same_bits(
    tmp_path: Path, two: Path, cache_dir: Path
) -> None:
    planted = {"what": "kill", "rank": 1, "step": 9, "once": str(tmp_path / "once")}
    again = command(2, tmp_path, "resume=auto", options=("--max-restarts=1",))
    code, said = finish(again, surroundings(cache_dir, planted))
    assert code == 0, said[-4000:]
    assert (tmp_path / "once").exists()
    # The other rank sees it in its next collective, unless torchrun ends it before that.
    assert said.count("error: Another rank exited; see its log.") <= 1, said[-4000:]
    assert_same(tmp_path / "runs/tiny", two / "runs/tiny")


@pytest.mark.slow
def test_three_processes_train_what_one_does(tmp_path: Path, one: Path, cache_dir: Path) -> None:
    code, said = finish(command(3, tmp_path), surroundings(cache_dir, folder=tmp_path))
    assert code == 0, said[-4000:]
    assert_close(tmp_path / "runs/tiny", one)
    assert_is_one_run(tmp_path / "runs/tiny")
    weights = [read_model(folder / "checkpoints/last") for folder in (tmp_path / "runs/tiny", one)]
    assert largest_difference(*weights) < WEIGHT


@pytest.mark.slow
def test_a_torchrun_that_is_sent_sigterm_saves_and_resumes_to_the_same_bits(
    tmp_path: Path, two: Path, cache_dir: Path
) -> None:
    metrics, environment = tmp_path / "runs/tiny/metrics.jsonl", surroundings(cache_dir)
    with started(command(2, tmp_path, "resume=auto"), **environment) as process:
        wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > 4)
        said = ask_to_end(process)
    assert process.returncode != 0 and "stopped by SIGTERM after step" in said, said[-4000:]
    assert json.loads((metrics.parent / "checkpoints/last/state.json").read_text())["step"] < 18
    code, said = finish(command(2, tmp_path, "resume=auto"), environment)
    assert code == 0, said[-4000:]
    assert_same(tmp_path / "runs/tiny", two / "runs/tiny")


@pytest.mark.slow
def test_two_machines_with_a_torchrun_each_train_what_one_process_does(
    tmp_path: Path, one: Path, cache_dir: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ("--nnodes=2", "--rdzv-id=mtl", f"--rdzv-endpoint=127.0.0.1:{port}")
    whole, environment = command(1, tmp_path, options=options), surroundings(cache_dir)
    with started(whole, **environment) as first, started(whole, **environment) as second:
        said = [machine.communicate(timeout=HANGS_S)[1] for machine in (first, second)]
        assert [first.returncode, second.returncode] == [0, 0], said
    assert_close(tmp_path / "runs/tiny", one)
    assert_is_one_run(tmp_path / "runs/tiny")
    assert json.loads((tmp_path / "runs/tiny/checkpoints/last/state.json").read_text())["world_size"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 3])
def test_a_run_of_two_processes_resumes_inside_an_epoch_with_another_number(
    tmp_path: Path, one: Path, cache_dir: Path, number: int
) -> None:
    planted = {"what": "kill", "rank": 0, "step": 9}
    code, _ = finish(command(2, tmp_path), surroundings(cache_dir, planted))
    last = json.loads((tmp_path / "runs/tiny/checkpoints/last/state.json").read_text())
    assert code == 1 and last["step"] == 8 and last["within_epoch"] and last["world_size"] == 2
    code, said = finish(command(number, tmp_path, "resume=auto"), surroundings(cache_dir))
    assert code == 0, said[-4000:]
    assert_close(tmp_path / "runs/tiny", one)
    assert_is_one_run(tmp_path / "runs/tiny")


# With all that has a state of its own, and with BatchNorm that trains.
STATEFUL: dict[str, Any] = {
    "trunk": {"name": "test_resnet", "options": {"drop_path_rate": 0.2}},
    "data": {**TINY["data"], "num_train": 44, "augment": {"brightness": 0.2}},
    "cache": {"views": 2},
    "freeze_always": [],
    "checkpoint": {"every_steps": 1},
    "tracking": {"mode": "disabled", "log_every_steps": 3},
    "phases": PHASES,
}


@pytest.mark.slow
def test_a_run_whose_processes_are_all_killed_again_and_again_ends_with_the_bits_of_one_that_was_not(
    tmp_path: Path, cache_dir: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    environment = surroundings(cache_dir) | {"WANDB_MODE": "disabled"}
    code, said = finish(command(2, whole, **STATEFUL), environment, 240)
    assert code == 0, said[-4000:]
    metrics, deaths = killed / "runs/tiny/metrics.jsonl", 0
    for rows in (2, 8, 14, 20, 26):
        with started(command(2, killed, "resume=auto", **STATEFUL), **environment) as process:
            wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= rows)  # noqa: B023
            kill_all(process)
            deaths += process.returncode == -9
    assert deaths == 5
    code, said = finish(command(2, killed, "resume=auto", **STATEFUL), environment, 240)
    assert code == 0, said[-4000:]
    (weights, rows, audit), (expected, expected_rows, expected_audit) = (
        results(folder / "runs/tiny") for folder in (killed, whole)
    )
    assert rows == expected_rows and weights == expected
    assert audit["ok"] and audit == expected_audit


@pytest.mark.slow
def test_a_phase_that_lasts_a_time_ends_at_the_same_step_in_all_processes(tmp_path: Path, cache_dir: Path) -> None:
    # The second process's clock runs ten times as fast.
    planted = {"what": "clock", "rank": 1, "rate": 10.0}
    phases = [{"name": "timed", "until": {"wall_time_s": 4.0}, "max_steps": 5000}, {"name": "after", "steps": 2}]
    environment = surroundings(cache_dir, planted, tmp_path) | {"WANDB_MODE": "disabled"}
    code, said = finish(command(2, tmp_path, phases=phases, checkpoint={}), environment)
    assert code == 0, said[-4000:]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    assert 2 < ranks[0][0]["steps"] < 5000 and ranks[0][1]["steps"] == 2
