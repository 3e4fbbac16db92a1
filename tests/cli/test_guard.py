"""One guard around every verb: signals at real moments, closed and full outputs, exit codes; with real processes."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import forks
from mtl.cli import main
from mtl.runtime.files import in_one_line, is_of_the_machine
from mtl.runtime.signals import Interrupt, raised_signals
from processes import HANGS_S, started
from runs import small_config

ENDING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a line of bash, in which `mtl` is this Python's, and a pipe ends with the code of its first part.

    `forked` is the same program in a fork, whose outputs have to be open.
    """
    program = f'set -o pipefail\nmtl() {{ {sys.executable} -m mtl "$@"; }}\n{forks.in_bash()}\n{line}'
    return subprocess.run(
        ["bash", "-c", program],
        capture_output=True,
        text=True,
        timeout=HANGS_S,
        cwd=folder,
        env={key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"},
        stdin=subprocess.DEVNULL,
        check=False,
    )


# --- signals


def signalled_in_imports(arguments: Sequence[str], sent: signal.Signals) -> tuple[int, list[str]]:
    """The end of a program that is sent a signal amid the import of torch, which `-X importtime` reports."""
    with started([sys.executable, "-X", "importtime", "-m", "mtl", *arguments]) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("import time:") and line.rstrip().endswith(" torch._utils_internal"):
                break
        process.send_signal(sent)
        _, said = process.communicate(timeout=HANGS_S)
    lines = [line for line in said.splitlines() if not line.startswith("import time:")]
    assert not any(re.search(r"\| torch$", line) for line in said.splitlines()), "it came too late"
    return process.returncode, lines


@pytest.mark.parametrize("sent", ENDING)
def test_a_signal_while_torch_is_imported_is_one_line_and_what_is_saved(tmp_path: Path, sent: signal.Signals) -> None:
    code, lines = signalled_in_imports(["train", str(small_config(tmp_path))], sent)
    assert (code, lines) == (1, ["", f"stopped by {sent.name}", "Nothing was saved yet."])
    assert not (tmp_path / "runs").exists()


def test_a_verb_that_saves_nothing_says_only_that_it_was_stopped(tmp_path: Path) -> None:
    code, lines = signalled_in_imports(["plan", str(small_config(tmp_path))], signal.SIGINT)
    assert (code, lines) == (1, ["", "stopped by SIGINT"])


# Says when it has come to a place, and waits there.
PAUSE = """
import signal, sys
from mtl.cli import main
import {module}
def pause(*_, **__):
    sys.stderr.write("here\\n")
    sys.stderr.flush()
    while True:
        signal.pause()
{module}.{name} = pause
sys.exit(main(sys.argv[1:]))
"""


def signalled_at(module: str, name: str, arguments: Sequence[str], sent: signal.Signals) -> tuple[int, list[str]]:
    """The end of a program that was sent a signal inside a function."""
    program = PAUSE.format(module=module, name=name)
    with started([sys.executable, "-c", program, *arguments], WANDB_MODE="disabled") as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "here\n"
        process.send_signal(sent)
        _, said = process.communicate(timeout=HANGS_S)
    return process.returncode, said.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("sent", ENDING)
def test_a_signal_while_the_report_is_drawn_says_that_training_is_over(tmp_path: Path, sent: signal.Signals) -> None:
    file = small_config(tmp_path, phases=[{"name": "a", "steps": 1}])
    code, lines = signalled_at("mtl.results.report.write", "predict", ["train", str(file), "-q"], sent)
    run_dir = tmp_path / "runs/tiny"
    report = f"Training is complete and saved. To write the report: mtl report {run_dir}"
    assert (code, lines) == (1, ["", f"stopped by {sent.name}", report])
    assert main(["report", str(run_dir)]) == 0


def test_a_signal_after_the_last_step_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mtl.training.loop import Trainer

    train = Trainer.run

    def signalled(trainer: Trainer) -> object:
        result = train(trainer)
        signal.raise_signal(signal.SIGTERM)
        return result

    monkeypatch.setattr(Trainer, "run", signalled)
    assert main(["train", str(small_config(tmp_path, phases=[{"name": "a", "steps": 1}])), "-q"]) == 1
    run_dir = tmp_path / "runs/tiny"
    report = f"Training is complete and saved. To write the report: mtl report {run_dir}"
    assert capsys.readouterr().err.splitlines() == ["", "stopped by SIGTERM", report]
    assert not (run_dir / "report.html").exists()


@pytest.mark.slow
def test_a_signal_while_data_is_made_leaves_nothing_behind(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    arguments = ["train", str(small_config(tmp_path)), "-q", f"data.cache_dir={cache}"]
    code, lines = signalled_at("mtl.data.generated.rows_file", "_write_header", arguments, signal.SIGTERM)
    assert (code, lines) == (1, ["", "stopped by SIGTERM", "Nothing was saved yet."])
    assert list(cache.iterdir()) == [] and not (tmp_path / "runs").exists()


def test_a_second_signal_ends_the_program_though_the_first_one_was_lost() -> None:
    program = """
import os, signal, sys, time
from mtl.runtime.signals import raised_signals
with raised_signals():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except KeyboardInterrupt as error:
        print(error)
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGTERM)
    print("not ended")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "SIGTERM\n")


@pytest.mark.parametrize("is_ignored", [True, False])
def test_a_closed_terminal_ends_a_program_unless_nohup_keeps_it_alive(is_ignored: bool) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    try:
        with raised_signals(), Interrupt() as asked:
            if is_ignored:
                os.kill(os.getpid(), signal.SIGHUP)
                assert asked.name == ""
            else:
                os.kill(os.getpid(), signal.SIGHUP)
                assert asked.name == "SIGHUP"
                with pytest.raises(KeyboardInterrupt, match="SIGHUP"):
                    os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is (signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)


# --- outputs


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("mtl --help > /dev/full", "No space left on device"),
        ("mtl --version > /dev/full", "No space left on device"),
        ("mtl --version >&-", "Bad file descriptor"),
        pytest.param("forked plan tiny.yaml > /dev/full", "No space left on device", marks=pytest.mark.slow),
        pytest.param("mtl plan tiny.yaml >&-", "Bad file descriptor", marks=pytest.mark.slow),
        pytest.param("forked plan tiny.yaml --params | true", "Broken pipe", marks=pytest.mark.slow),
    ],
)
def test_an_output_that_takes_nothing_is_one_line_and_exit_code_1(tmp_path: Path, command: str, reason: str) -> None:
    small_config(tmp_path)
    done = shell(command, tmp_path)
    assert (done.returncode, done.stderr) == (1, f"error: standard output cannot be written: {reason}\n")


@pytest.mark.slow
def test_a_reader_that_reads_one_line_gets_it(tmp_path: Path) -> None:
    small_config(tmp_path)
    done = shell("forked plan tiny.yaml --params | head -1", tmp_path)
    assert done.stdout.startswith("parameter ") and "Traceback" not in done.stderr
    # Either all fitted into the pipe before `head` was gone, or not.
    assert (done.returncode, done.stderr) in [
        (0, ""),
        (1, "error: standard output cannot be written: Broken pipe\n"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mtl", "output", "reason"),
    [
        ("forked", "| true", "Broken pipe"),
        ("forked", "> /dev/full", "No space left on device"),
        ("mtl", ">&-", "Bad file descriptor"),
    ],
)
def test_a_run_whose_output_is_gone_says_so_once_and_trains_to_its_end(
    tmp_path: Path, mtl: str, output: str, reason: str
) -> None:
    small_config(tmp_path, phases=[{"name": "a", "steps": 1}])
    done = shell(f"{mtl} train tiny.yaml {output}", tmp_path)
    said = f"warning: standard output cannot be written ({reason}): the run continues without it\n"
    assert (done.returncode, done.stderr) == (0, said)
    assert (tmp_path / "runs/tiny/report.html").is_file()


def test_a_closed_standard_error_costs_no_file_and_no_exit_code(tmp_path: Path) -> None:
    small_config(tmp_path)
    for output in ("2>&-", "2> /dev/full", "2>&- >&-", "<&-"):
        assert shell(f"mtl plan nowhere.yaml {output}", tmp_path).returncode == 2


# --- what is known and what is not


@pytest.mark.slow
def test_an_error_of_ours_keeps_its_traceback_and_is_exit_code_1(tmp_path: Path) -> None:
    program = (
        "import sys, mtl.phases.setup\nfrom mtl.cli import main\n"
        "def broken(*_, **__): return {}['bug']\nmtl.phases.setup.build_meta_setup = broken\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    done = forks.run(["-c", program, "plan", str(small_config(tmp_path))], timeout=HANGS_S)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("Traceback") and done.stderr.endswith("KeyError: 'bug'\n")


def test_what_a_disk_does_to_any_program_is_distinguished_from_our_own_errors() -> None:
    refused = PermissionError(errno.EACCES, "Permission denied", "runs/x/config.yaml")
    assert is_of_the_machine(refused) and in_one_line(refused) == "runs/x/config.yaml: Permission denied"
    assert is_of_the_machine(OSError(errno.EROFS, "Read-only file system"))
    assert not is_of_the_machine(FileNotFoundError(errno.ENOENT, "No such file or directory", "x"))
    assert not is_of_the_machine(ValueError("x"))


@pytest.mark.slow
def test_a_report_of_a_damaged_run_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(small_config(tmp_path, phases=[{"name": "a", "steps": 1}])), "-q"]) == 0
    run_dir = tmp_path / "runs/tiny"
    for name in ("checkpoints/best/model.safetensors", "audit.json", "metrics.jsonl", "config.yaml"):
        file = run_dir / name
        content = file.read_bytes()
        # Half a last row of metrics is what a kill leaves, and no damage.
        file.write_bytes(content[20:] if name == "metrics.jsonl" else content[:-20])
        capsys.readouterr()
        assert main(["report", str(run_dir)]) == 2, name
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1 and said.startswith("error: ") and file.name in said, said
        file.write_bytes(content)


@pytest.mark.slow
def test_a_report_of_a_run_without_a_whole_row_is_drawn(tmp_path: Path) -> None:
    assert main(["train", str(small_config(tmp_path, phases=[{"name": "a", "steps": 1}])), "-q"]) == 0
    metrics = tmp_path / "runs/tiny/metrics.jsonl"
    metrics.write_text('{"step": 1, "pha')
    assert main(["report", str(tmp_path / "runs/tiny")]) == 0
