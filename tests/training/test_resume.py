"""A run that is killed, at whatever moment, ends with the bits of one that never stopped."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import forks
import killed_run
from crashes import SHORT, assert_same, crashed, results, resume, run_whole
from forks import Forked
from mtl.audit import AuditError, GradientAudit
from mtl.cli import main
from mtl.config import ConfigError, load_config
from mtl.training.run import train
from mtl.training.run_dir import MARK, claimed_run_dir
from once import made_once
from processes import HANGS_S, wait_until
from runs import TINY, TWO, read_metrics, small_config, small_parts

# All that has a state of its own: kept features, a kept prefix, views of images, accumulation, averages, moments that
# rest, three kinds of balancing, random depths, a rate that waits for a plateau, weights that are gone back to.
PHASES: list[dict[str, Any]] = [
    {"name": "warm", "freeze": ["trunk"], "epochs": 3, "cache": "ram", "balance": "dwa"},
    {"name": "alone", "tasks": ["depth"], "freeze": ["trunk"], "steps": 3},
    {"name": "half", "freeze": ["trunk@first:50%"], "epochs": 3, "balance": "famo", "lr_schedule": "cosine"},
    {"name": "look", "evaluate_only": True},
    {
        "name": "all",
        "epochs": 3,
        "restore": "best",
        "optimizer": {"name": "sgd", "options": {"momentum": 0.9}},
        "lr": 1e-3,
        "lr_schedule": {"name": "plateau", "patience": 1},
    },
    {"name": "end", "freeze": ["heads.depth", "trunk@last:1"], "steps": 8, "balance": "random"},
]
EVERYTHING: dict[str, Any] = {
    "tasks": TWO,
    "trunk": {"name": "test_resnet", "options": {"drop_path_rate": 0.2}},
    "data": {**TINY["data"], "num_train": 44, "augment": {"brightness": 0.2}},
    "cache": {"views": 2},
    "optim": {"ema_decay": 0.9, "accumulate": 2, "clip_norm": 1.0},
    "checkpoint": {"every_steps": 1, "keep_every_epochs": 4},
    "tracking": {"mode": "offline", "log_every_steps": 3},
    "phases": PHASES,
}


@pytest.fixture(scope="module")
def whole_short(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    return made_once(tmp_path_factory, "resume-short", lambda folder: run_whole(folder, cache_dir, SHORT))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    """The run directory of one that never stopped."""
    return made_once(tmp_path_factory, "resume-whole", lambda folder: run_whole(folder, cache_dir, EVERYTHING))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_that_is_killed_at_random_moments_ends_with_the_bits_of_one_that_never_stopped(
    tmp_path: Path, whole: Path, seed: int
) -> None:
    file = small_config(tmp_path, **EVERYTHING)
    killed = forks.run([killed_run.__file__, str(file), str(seed), "16"], timeout=HANGS_S)
    assert killed.returncode == 0, killed.stderr[-2000:]
    # Between them is what the runs warn of.
    deaths = [json.loads(line) for line in killed.stdout.splitlines() if line.startswith("{")]
    assert len(deaths) > 10 and any(death["half"] for death in deaths)
    assert_same(tmp_path / "runs/tiny", whole)


# In the first epoch, before anything was saved and after it; after an epoch; in the next phase; in its last step.
@pytest.mark.parametrize("step", [3, 8, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 4, 11))])
def test_a_run_that_ends_in_a_step_resumes_to_the_same_bits(tmp_path: Path, whole_short: Path, step: int) -> None:
    crashed(tmp_path, step)
    assert_same(resume(tmp_path), whole_short)


def test_a_phase_of_which_one_pass_is_left_keeps_features_as_it_did_before(tmp_path: Path, cache_dir: Path) -> None:
    phases = {"phases": [{"name": "a", "freeze": ["trunk"], "epochs": 3}]}
    whole = run_whole(tmp_path / "whole", cache_dir, {**SHORT, **phases})
    # Epochs have three steps; that of the crash is the first one of the last epoch, of which nothing was saved.
    crashed(tmp_path, 7, **phases)
    assert_same(resume(tmp_path, **phases), whole)


@pytest.mark.slow
def test_a_phase_that_would_find_features_in_memory_decides_as_if_it_still_did(tmp_path: Path, cache_dir: Path) -> None:
    # A single pass would not pay, but for what the phase before has left.
    later = [{"name": "b", "freeze": ["trunk"], "tasks": ["depth"], "epochs": 1}, {"name": "c", "epochs": 1}]
    phases = {"phases": [SHORT["phases"][0], *later]}
    whole = run_whole(tmp_path / "whole", cache_dir, {**SHORT, **phases})
    crashed(tmp_path, 7, **phases)
    assert_same(resume(tmp_path, **phases), whole)


def test_a_run_that_is_over_is_closed_again_and_stays_the_same(tmp_path: Path, whole_short: Path) -> None:
    train(small_parts(tmp_path, **SHORT), quiet=True)
    before = results(tmp_path / "runs/tiny")
    assert results(resume(tmp_path)) == before
    assert_same(tmp_path / "runs/tiny", whole_short)


def test_auto_begins_where_there_is_nothing(tmp_path: Path, whole_short: Path) -> None:
    assert_same(resume(tmp_path), whole_short)


def test_another_run_can_be_begun_from_the_middle_of_an_epoch(tmp_path: Path, whole_short: Path) -> None:
    run_dir = crashed(tmp_path, 6)
    again = resume(tmp_path, f"resume={run_dir}", "name=again")
    weights, _, audit = results(again)
    expected, _, expected_audit = results(whole_short)
    assert (weights, audit) == (expected, expected_audit)
    assert next(row["step"] for row in read_metrics(again) if "train/loss" in row) == 5


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) * 2 // 3] ^= 16
    file.write_bytes(content)


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("optimizer.safetensors", "state.json")),
    ],
)
def test_a_damaged_checkpoint_is_said_and_an_older_one_taken(
    tmp_path: Path, whole_short: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    run_dir = crashed(tmp_path, 9)
    last = (run_dir / "checkpoints/last").resolve()
    damage(last / name)
    assert_same(resume(tmp_path), whole_short)
    (said,) = [record.message for record in caplog.records if "an older checkpoint is loaded" in record.message]
    assert last.name in said and ("damaged" in said)


def test_where_every_checkpoint_is_damaged_nothing_is_trained(tmp_path: Path) -> None:
    run_dir = crashed(tmp_path, 9)
    before = (run_dir / "metrics.jsonl").read_bytes()
    for file in (run_dir / "checkpoints").glob("step-*/model.safetensors"):
        damage(file)
    with pytest.raises(ConfigError, match=r"resume: .* has no checkpoint that is sound: .*model\.safetensors"):
        resume(tmp_path)
    assert (run_dir / "metrics.jsonl").read_bytes() == before


def test_a_run_from_before_there_were_marks_resumes_by_its_checkpoints(tmp_path: Path, whole_short: Path) -> None:
    run_dir = crashed(tmp_path, 6)
    (run_dir / MARK).unlink()
    (run_dir / "history.json").unlink(missing_ok=True)
    assert_same(resume(tmp_path), whole_short)
    assert (run_dir / MARK).is_file()


def test_nobody_who_gave_a_name_is_advised_to_give_another_one(tmp_path: Path) -> None:
    run_dir = crashed(tmp_path, 4)
    with pytest.raises(ConfigError, match=r"another value; without resume, a run begins with it$"):
        resume(tmp_path, f"resume={run_dir}", "name=again", "seed=1")
    with pytest.raises(ConfigError, match=r"another value; begin a new one, with another name$"):
        resume(tmp_path, "seed=1")


def test_another_configuration_is_refused_with_the_difference(tmp_path: Path) -> None:
    crashed(tmp_path, 4)
    for overrides, message in [
        (["optim.weight_decay=0.1"], r"optim\.weight_decay: 0\.05 -> 0\.1; the configuration is not the one"),
        (["phases.b.steps=6"], r"phases\.b\.steps: 5 -> 6; .*resume_override=true resumes with the new one"),
        (["trunk.name=test_vit", "resume_override=true"], r"trunk\.name: test_resnet -> test_vit; a run cannot resume"),
        (["seed=1", "resume_override=true"], r"seed: 0 -> 1; a run cannot resume with another value"),
    ]:
        with pytest.raises(ConfigError, match=message):
            resume(tmp_path, *overrides)


def test_with_an_override_it_continues_with_what_can_be_honoured(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    crashed(tmp_path, 4)
    run_dir = resume(tmp_path, "phases.b.steps=7", "optim.weight_decay=0.1", "resume_override=true")
    assert [row["step"] for row in read_metrics(run_dir) if "val/score" in row][-1] == 13
    assert any("with another optim.weight_decay: 0.05 -> 0.1" in record.message for record in caplog.records)


def test_a_run_that_the_audit_ended_is_not_resumed_unless_it_is_asked_for(
    tmp_path: Path, whole_short: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = small_parts(tmp_path, **SHORT)
    real, number = GradientAudit.after_step, iter(range(100))

    def after_step(audit: Any) -> None:
        if next(number) == 4:
            with torch.no_grad():
                next(parts.model.trunk.parameters()).view(-1)[0] += 1
        real(audit)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(AuditError):
        patch.setattr(GradientAudit, "after_step", after_step)
        train(parts, quiet=True)
    said = r"resume: the audit ended this run: .*: param_changed, step \d of phase 'a', see .*audit\.json; mend"
    for override in ("seed=0", "audit.policy=collect"):
        with pytest.raises(ConfigError, match=said):
            resume(tmp_path, override)
    assert_same(resume(tmp_path, "resume_override=true"), whole_short)
    assert any("it resumes from what was saved before that" in record.message for record in caplog.records)


def test_two_processes_do_not_train_in_one_directory(tmp_path: Path) -> None:
    run_dir = crashed(tmp_path, 4)
    config = load_config(small_config(tmp_path, **SHORT), ["resume=auto"])
    with (
        claimed_run_dir(config, resumes=True),
        pytest.raises(ConfigError, match=r"another process is training in .*tiny"),
    ):
        resume(tmp_path)
    assert resume(tmp_path) == run_dir


@pytest.mark.slow
@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_within_the_step_and_the_run_resumes_to_the_same_bits(
    tmp_path: Path, whole: Path, asked: signal.Signals
) -> None:
    file = small_config(tmp_path, **{**EVERYTHING, "checkpoint": {"keep_every_epochs": 4}})
    command = ["-m", "mtl", "train", str(file), "-q", "resume=auto"]
    process = Forked(command, stderr=subprocess.PIPE)
    metrics = tmp_path / "runs/tiny/metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > 20)
    process.send_signal(asked)
    _, said = process.communicate(timeout=HANGS_S)
    assert process.returncode == 1
    assert f"stopped by {asked.name} after step" in said and "To resume, rerun with resume=auto." in said
    assert main(command[2:]) == 0
    assert_same(tmp_path / "runs/tiny", whole)


@pytest.mark.parametrize("inside", ["checkpoints/good-step-00000012/state.json", "checkpoints/notes.txt"])
def test_checkpoints_that_no_run_can_resume_from_are_not_cleared_away(
    tmp_path: Path, inside: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "runs/tiny" / inside
    file.parent.mkdir(parents=True)
    file.write_text('{"step": 12, "phases": [], "scheduler": {}, "audit": {}, "config": {}, "digests": {}}')
    for mark in (False, True):
        if mark:
            (tmp_path / "runs/tiny" / MARK).touch()
        assert main(["train", str(small_config(tmp_path)), "resume=auto"]) == 2
        said = capsys.readouterr().err
        assert ("no checkpoint to resume from" if mark else "already holds files") in said
        assert file.is_file()
