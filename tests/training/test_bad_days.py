"""Whole runs on bad days: each ends with one message that says what to do, and resumes to the bits of a good day."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import forks
import mtl.checkpoint.folder
import wandb_file
from crashes import SHORT, assert_same, crash, crashed, results, resume
from mtl.checkpoint.folder import SaveError
from mtl.cli import main
from mtl.runtime.signals import Stopped
from mtl.training.loop import Trainer
from mtl.training.phase import ActivePhase
from mtl.training.run import train
from mtl.training.step_sync import StepSync
from processes import HANGS_S, started, wait_until, workers
from runs import read_metrics, small_config, small_parts, tiny_config, tiny_parts

ROOT = Path(__file__).parents[2]
# One file of a run after another may meet a full disk; nothing here takes long.
SMALL: dict[str, Any] = SHORT | {"tracking": {"mode": "disabled", "log_every_steps": 1}}


@pytest.fixture(autouse=True)
def _without_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")


def command(file: Path, *overrides: str, before: str = "") -> list[str]:
    """`mtl train`, quietly, in a process in which something is done before."""
    program = f"import sys\nfrom mtl.cli import main\n{before}\nsys.exit(main(sys.argv[1:]))"
    return [sys.executable, "-c", program, "train", str(file), "-q", *overrides]


def run(file: Path, *overrides: str, before: str = "") -> subprocess.CompletedProcess[str]:
    return forks.run(command(file, *overrides, before=before)[1:], timeout=HANGS_S)


def ended_well(said: subprocess.CompletedProcess[str], code: int) -> str:
    """What was said by a run that ended with a code, and without a traceback."""
    assert said.returncode == code, said.stderr[-3000:]
    assert "Traceback" not in said.stderr and "Warning" not in said.stderr, said.stderr[-3000:]
    return said.stderr


def whole_run(tmp_path: Path, settings: dict[str, Any]) -> Path:
    (tmp_path / "whole").mkdir()
    return train(small_parts(tmp_path / "whole", **settings), quiet=True).run_dir


# --- a full disk

# Fills the disk that the run directory is on just before something is written for the n-th time.
FILL = """
import mtl.{module}
real, left = mtl.{module}.{name}, [{number}]
def fill(*arguments, **options):
    if {condition}:
        left[0] -= 1
        if left[0] == 0:
            with open({disk!r} + "/filler", "wb", buffering=0) as stream:
                for size in (4096, 1):
                    try:
                        while True:
                            stream.write(bytes(size))
                    except OSError:
                        pass
    return real(*arguments, **options)
mtl.{module}.{name} = fill
"""
MOMENTS = {
    "a checkpoint": {"module": "checkpoint.folder", "name": "Checkpoints._write", "number": 4, "condition": "True"},
    "the metrics": {"module": "training.tracking.tracker", "name": "Tracker.log", "number": 6, "condition": "True"},
    "the audit": {
        "module": "training.tracking.log",
        "name": "write_json",
        "number": 2,
        "condition": "str(arguments[0]).endswith('audit.json')",
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["a checkpoint", "the metrics", "the audit"])
def test_a_disk_that_fills_ends_the_run_with_a_message_and_it_continues_once_there_is_room(
    tmp_path: Path, small_disk: Path, moment: str
) -> None:
    whole = whole_run(tmp_path, SMALL)
    subprocess.run(["mount", "-o", "remount,size=40m", str(small_disk)], check=True)
    file = small_config(tmp_path, **SMALL | {"runs_dir": str(small_disk)})
    said = ended_well(run(file, before=FILL.format(disk=str(small_disk), **MOMENTS[moment])), 1)
    assert re.match(r"error: (the disk is full|.* cannot be written: it needs [\d,]+ bytes, and [\d,]+ are free)", said)
    assert said.splitlines()[-1] == "To resume, rerun with resume=auto."
    (small_disk / "filler").unlink()
    assert not [*(small_disk / "tiny").rglob("*.tmp")]
    ended_well(run(file, "resume=auto"), 0)
    assert_same(small_disk / "tiny", whole)


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")


def test_a_report_that_does_not_fit_on_the_disk_is_said_and_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mtl.results.report.write.write_text", full)
    assert main(["train", str(small_config(tmp_path, phases=[{"name": "a", "steps": 1}])), "-q"]) == 0
    said = capsys.readouterr()
    assert (
        f"report.html cannot be written (No space left on device); to write it later: mtl report {tmp_path}" in said.out
    )
    assert said.err == ""


def refuse_checkpoint(patch: pytest.MonkeyPatch, step: int) -> None:
    """The disk is full for the checkpoint of a step."""
    real = mtl.checkpoint.folder.write_state

    def write(folder: Path, state: dict[str, Any]) -> None:
        if state["step"] == step:
            full()
        real(folder, state)

    patch.setattr("mtl.checkpoint.folder.write_state", write)


def test_what_ends_a_run_is_raised_and_that_its_last_checkpoint_could_not_be_written_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = whole_run(tmp_path, SMALL)
    with pytest.MonkeyPatch.context() as patch:
        refuse_checkpoint(patch, 4)
        crash(tmp_path, 5, **SMALL)
    said = [record.getMessage() for record in caplog.records if "cannot be written" in record.getMessage()]
    assert len(said) == 1 and "checkpoints/step-00000004 cannot be written: it needs" in said[0]
    assert (tmp_path / "runs/tiny/checkpoints/last").resolve().name == "step-00000003"
    assert_same(resume(tmp_path, **SMALL), whole)


def test_a_run_that_was_asked_to_stop_does_not_say_that_it_saved_what_it_could_not(tmp_path: Path) -> None:
    exit_if_asked = StepSync.exit_if_asked

    def asked(sync: StepSync, step: int) -> None:
        if step == 4:
            raise Stopped("stopped: saved")
        exit_if_asked(sync, step)

    parts = tiny_parts(tmp_path, **SMALL)
    with pytest.MonkeyPatch.context() as patch:
        refuse_checkpoint(patch, 4)
        patch.setattr(StepSync, "exit_if_asked", asked)
        with pytest.raises(SaveError, match="step-00000004 cannot be written"):
            train(parts, quiet=True)


def test_what_ended_a_run_is_said_though_the_disk_has_no_room_for_the_audit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Trainer.train_epoch

    def spoil(trainer: Trainer, active: ActivePhase) -> None:
        monkeypatch.setattr("mtl.training.tracking.log.write_json", full)
        with torch.no_grad():
            trainer.setup.model.get_parameter("trunk.conv1.0.weight")[0] += 1
        real(trainer, active)

    monkeypatch.setattr(Trainer, "train_epoch", spoil)
    assert main(["train", str(small_config(tmp_path)), "-q"]) == 3
    said = capsys.readouterr()
    assert said.err.startswith("error: audit: ") and "trunk.conv1.0.weight: param_changed" in said.err
    assert "somewhere cannot be written" in said.out


# --- too little memory

# MB more than the program has by itself.
LIMIT = """
import re, resource
import mtl.results.report.write, mtl.training.run, mtl.phases.plan.text, mtl.results.summary
size = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + {mb} * 2**20,) * 2)
"""
LARGE = ["data.image_size=96", "data.num_train=64", "data.batch_size=64"]


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_with_too_little_memory_says_what_was_planned_and_what_to_change(
    tmp_path: Path, num_workers: int
) -> None:
    made = tiny_parts(tmp_path, *LARGE)  # the data: making it takes memory too
    del made
    large = [*LARGE, f"data.num_workers={num_workers}"]
    said = ended_well(run(tiny_config(tmp_path), *large, before=LIMIT.format(mb=200)), 1)
    assert said.startswith("error: out of memory: ")
    assert "the plan, for phase 'finetune', which needs most: 2.22 MB of weights, 2.18 MB of gradients" in said
    assert "what makes it smaller: data.batch_size=32 with optim.accumulate=2" in said
    assert said.endswith("Nothing was saved yet.\n")


@pytest.mark.slow
def test_memory_that_runs_out_before_the_first_step_is_said_so(tmp_path: Path) -> None:
    cache = f"data.cache_dir={tmp_path / 'cache'}"  # nothing was made before
    done = run(tiny_config(tmp_path), *LARGE, "data.num_train=6000", cache, before=LIMIT.format(mb=200))
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "error: out of memory before the first step: " in done.stderr
    assert "what makes them smaller: data.num_train" in done.stderr


# --- lost and damaged pieces


def lose(name: str) -> Callable[[Path], object]:
    return lambda run_dir: (run_dir / name).unlink()


def cut(name: str, num_bytes: int) -> Callable[[Path], object]:
    return lambda run_dir: os.truncate(run_dir / name, num_bytes)


def relink(run_dir: Path) -> None:
    last = run_dir / "checkpoints/last"
    last.unlink()
    last.symlink_to("step-00000077")


def as_of_version(folder: Path, version: int) -> None:
    """Rewrites a checkpoint's JSON as a program of another version would, digest and all."""
    from mtl.checkpoint.files import state_digest

    file = folder / "state.json"
    state = json.loads(file.read_text()) | {"version": version}
    state["digests"]["state"] = state_digest(state)
    file.write_text(json.dumps(state))


GOES_ON: dict[str, Callable[[Path], object]] = {
    "config.yaml": lose("config.yaml"),
    "audit.json": lose("audit.json"),
    "plan.json": lose("plan.json"),
    "a link to nowhere": relink,
    "no links": lambda run_dir: [(run_dir / "checkpoints" / name).unlink() for name in ("last", "best")],
}


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> tuple[Path, Path]:
    """A folder with a run that ended in its ninth step, and a run that never stopped."""
    folder = tmp_path_factory.mktemp("broken")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTL_CACHE_DIR", str(cache_dir))
        patch.setenv("WANDB_MODE", "disabled")
        crashed(folder, 9)
        return folder, whole_run(folder, SHORT)


def copy_of(broken: tuple[Path, Path], tmp_path: Path) -> Path:
    """The run directory of a copy of the broken run."""
    shutil.copytree(broken[0] / "runs", tmp_path / "runs", symlinks=True)
    return tmp_path / "runs/tiny"


@pytest.mark.parametrize("piece", GOES_ON)
def test_a_run_that_lost_what_a_checkpoint_has_resumes_to_the_same_bits(
    tmp_path: Path, broken: tuple[Path, Path], piece: str
) -> None:
    run_dir = copy_of(broken, tmp_path)
    GOES_ON[piece](run_dir)
    assert_same(resume(tmp_path), broken[1])
    assert (run_dir / "config.yaml").is_file() and (run_dir / "checkpoints/last").exists()


@pytest.mark.parametrize("left", [None, 1000])
def test_lost_rows_are_said_and_those_that_follow_can_be_read(
    tmp_path: Path, broken: tuple[Path, Path], left: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = copy_of(broken, tmp_path)
    (lose("metrics.jsonl") if left is None else cut("metrics.jsonl", left))(run_dir)
    resume(tmp_path)
    assert any("metrics.jsonl has lost rows: " in record.message for record in caplog.records)
    expected = [row["step"] for row in read_metrics(broken[1])]
    found = [row["step"] for row in read_metrics(run_dir)]
    assert 0 < len(found) < len(expected) and found[-4:] == expected[-4:]
    assert left is None or found[0] == expected[0]
    weights, _, audit = results(run_dir)
    assert (weights, audit) == (results(broken[1])[0], results(broken[1])[2])


def without_read(command: list[str]) -> list[str]:
    """A command without the right of root to read everything."""
    if os.geteuid() != 0:
        return command
    if not shutil.which("setpriv"):
        pytest.skip("needs setpriv, since root may read everything")
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]


def dangle(run_dir: Path) -> None:
    (run_dir / "checkpoints").rename(run_dir / "elsewhere")
    (run_dir / "checkpoints").symlink_to("/mnt/no-such-disk/checkpoints")


def of_another_version(run_dir: Path) -> None:
    for folder in (run_dir / "checkpoints").glob("step-*"):
        as_of_version(folder, 99)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "checkpoints on a disk that is not there": (
        dangle,
        r"is a link to /mnt/no-such-disk/checkpoints, which",
    ),
    "checkpoints that cannot be listed": (
        lambda run_dir: (run_dir / "checkpoints").chmod(0),
        r"checkpoints cannot be read \(Permission denied\)",
    ),
    "checkpoints that are a file": (
        lambda run_dir: [(run_dir / "checkpoints").rename(run_dir / "old"), (run_dir / "checkpoints").touch()],
        r"checkpoints cannot be read \(Not a directory\)",
    ),
    "checkpoints that cannot be opened": (
        lambda run_dir: [folder.chmod(0) for folder in (run_dir / "checkpoints").glob("step-*")],
        r"step-00000008 cannot be read: Permission denied",
    ),
    "another version": (of_another_version, r"state.json is of version 99; this program reads version 2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("piece", REFUSED)
def test_a_run_that_cannot_continue_says_why_and_leaves_everything_as_it_is(
    tmp_path: Path, broken: tuple[Path, Path], piece: str
) -> None:
    run_dir = copy_of(broken, tmp_path)
    spoil, message = REFUSED[piece]
    spoil(run_dir)
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.exists()}
    call = without_read(command(small_config(tmp_path, **SHORT), "resume=auto"))
    done = subprocess.run(call, capture_output=True, text=True, check=False, timeout=HANGS_S)
    said = ended_well(done, 2)
    assert len(said.splitlines()) == 1 and said.startswith("error: ") and re.search(message, said), said
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.exists()} == before
    for folder in [run_dir / "checkpoints", *(run_dir / "checkpoints").glob("step-*")]:
        if folder.is_dir():
            folder.chmod(0o755)  # for whoever clears up


def test_a_run_without_checkpoints_begins_again_and_says_so(
    tmp_path: Path, broken: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = copy_of(broken, tmp_path)
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "checkpoints").mkdir()
    assert_same(resume(tmp_path), broken[1])
    assert any("has no checkpoint: the run starts from scratch" in record.message for record in caplog.records)


# --- where to resume from

NASTY: dict[str, tuple[list[str], str]] = {
    "nothing": (["resume="], r"command line: resume: expected a value, got nothing"),
    "an empty text": (["resume=''"], r"command line: resume: expected text of at least 1 character"),
    "here": (["resume=.", "name=again"], r"command line: resume: \. is no checkpoint: it has no model\.safetensors"),
    "nowhere": (
        ["resume=/nonexistent", "name=again"],
        r"command line: resume: there is no /nonexistent",
    ),
    "a file": (["resume=tiny.yaml", "name=again"], r"command line: resume: tiny\.yaml is no checkpoint"),
    "other data": (
        ["resume=runs/tiny", "name=again", "data.num_train=41", "resume_override=true"],
        r"resume: data\.num_train: 40 -> 41; a run cannot resume with another value; without resume, a run begins",
    ),
    "another trunk": (
        ["resume=auto", "trunk.name=test_vit", "resume_override=true"],
        r"resume: trunk\.name: test_resnet -> test_vit; a run cannot resume with another value",
    ),
    "another configuration": (
        ["resume=runs/tiny", "name=again", "optim.accumulate=3"],
        r"resume: optim\.accumulate: 2 -> 3; .*resume_override=true resumes with the new one",
    ),
    "another configuration inside an epoch": (
        ["resume=auto", "optim.accumulate=3", "resume_override=true"],
        r"resume: .*step-00000008 is inside an epoch with batches of 8 and 2 batches a step",
    ),
}


@pytest.mark.parametrize("value", NASTY)
def test_a_place_that_no_run_can_continue_from_is_refused_in_one_line(
    tmp_path: Path, broken: tuple[Path, Path], value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_of(broken, tmp_path)
    overrides, message = NASTY[value]
    file = small_config(tmp_path, **SHORT | {"runs_dir": "runs"})
    before = sorted(tmp_path.rglob("*"))
    assert main(["train", str(file), "-q", *overrides]) == 2
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if not line.startswith("resume: with another")]
    assert len(lines) == 1 and re.search(message, said), said
    assert sorted(tmp_path.rglob("*")) == before


def test_an_ended_run_has_nothing_for_a_run_of_another_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = small_config(tmp_path, phases=[{"name": "a", "freeze": ["trunk"], "steps": 1}])
    assert main(["train", str(file), "-q"]) == 0
    assert main(["train", str(file), "-q", f"resume={tmp_path}/runs/tiny", "name=again"]) == 2
    assert (
        "is the end of its run: no phase is left; a checkpoint inside a phase can be resumed" in capsys.readouterr().err
    )
    assert not (tmp_path / "runs/again").exists()


# --- one run in wandb


@pytest.mark.slow
def test_all_parts_of_a_run_have_one_id_and_every_step_in_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = SHORT | {"tracking": {"mode": "offline", "log_every_steps": 1}}
    for end in (4, 8):
        file = small_config(tmp_path, **settings)
        ended = run(file, "resume=auto", before=CRASH.format(number=4))
        assert "Crash" in ended.stderr, (end, ended.stderr)
    ended_well(run(file, "resume=auto"), 0)
    files = sorted((tmp_path / "runs/tiny").glob("wandb/offline-run-*/*.wandb"))
    ids = {record.run.run_id for each in files for record in wandb_file.read_records(each) if record.HasField("run")}
    assert len(files) == 3 and len(ids) == 1
    logged = {row["_step"] for each in files for row in wandb_file.history(each)}
    # The plan is shown before the first step.
    assert logged - {0} == {row["step"] for row in read_metrics(tmp_path / "runs/tiny")}
    assert json.loads((tmp_path / "runs/tiny/checkpoints/last/state.json").read_text())["wandb_id"] in ids


@pytest.mark.slow
def test_a_run_whose_folder_of_wandb_is_gone_continues_in_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    file = small_config(tmp_path, **SHORT | {"tracking": {"mode": "offline"}})
    assert "Crash" in run(file, before=CRASH.format(number=6)).stderr
    run_dir = tmp_path / "runs/tiny"
    shutil.rmtree(run_dir / "wandb")
    ended_well(run(file, "resume=auto"), 0)
    state = json.loads((run_dir / "checkpoints/last/state.json").read_text())
    (found,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    assert state["wandb_id"] and state["wandb_id"] in found.name


CRASH = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests/support")!r})
import pytest
from crashes import crash_in_step
crash_in_step(pytest.MonkeyPatch(), {{number}})
"""


# --- data


@pytest.mark.slow
def test_a_run_whose_data_worker_is_killed_says_so_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    phases = [{"name": "a", "freeze": ["trunk"], "epochs": 2}, {"name": "b", "epochs": 12}]
    settings = SHORT | {"phases": phases, "cache": "off"}
    whole = whole_run(tmp_path, settings)
    file = small_config(tmp_path, **settings)
    with started(command(file, "data.num_workers=2")) as process:
        rows = tmp_path / "runs/tiny/metrics.jsonl"
        wait_until(lambda: rows.exists() and '"phase": "b"' in rows.read_text())
        # Workers come with every pass; some are killed when they are done.
        while process.poll() is None:
            for worker in workers(process):
                with suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)
        _, said = process.communicate(timeout=HANGS_S)
    assert process.returncode == 1 and "Traceback" not in said, said
    assert re.match(r"error: data worker \d \(pid \d+\) was killed by SIGKILL while it made a batch; if memory", said)
    assert said.endswith("To resume, rerun with resume=auto.\n")
    ended_well(run(file, "resume=auto", "data.num_workers=2"), 0)
    assert_same(tmp_path / "runs/tiny", whole)


SPOIL = """
import mtl.data.generated.generated_source
real = mtl.data.generated.generated_source.load_split
def load(*arguments):
    found = real(*arguments)
    for place in (3, 7):
        found.labels["depth"][place, 0, 0, 0] = float("inf")
    return found
mtl.data.generated.generated_source.load_split = load
"""


@pytest.mark.slow
def test_corrupt_samples_end_a_run_or_are_left_out_and_counted(tmp_path: Path) -> None:
    file = small_config(tmp_path, phases=[{"name": "a", "steps": 2}])
    said = ended_well(run(file, before=SPOIL), 2)
    assert said == (
        "error: scenes, train: sample 3 has a label of depth that cannot be trained on (samples with an infinite depth)"
        ", and 1 more have; data.on_bad_sample=skip leaves them out\n"
    )
    assert not (tmp_path / "runs").exists()
    done = run(file, "data.on_bad_sample=skip", before=SPOIL)
    ended_well(done, 0)
    assert "scenes, train: 2 of 40 samples are left out: 3, 7" in done.stdout
    assert "scenes, val: 2 of 20 samples are left out: 3, 7" in done.stdout
    assert json.loads((tmp_path / "runs/tiny/audit.json").read_text())["ok"]
