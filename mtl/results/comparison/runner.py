"""Trains the runs of a comparison, each in a process and directory of its own; what is done is not done again."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mtl.results.comparison.design import Design, DesignError, Job
from mtl.runtime.files import JsonFileError, read_json, write_json
from mtl.runtime.lock import locked

_SPEC, _DONE, _LOGS = "comparison.json", "done", "logs"
# What `mtl train` ends with: done, and done with a violation. Anything else is not done.
_ENDED = (0, 3)
_T = TypeVar("_T", int, dict[str, str])


@dataclass(frozen=True)
class Failure:
    """A run that did not end as it should.

    Attributes:
        job: Which.
        code: Its exit code.
        message: The last line that it printed.
    """

    job: Job
    code: int
    message: str


@contextmanager
def claimed(folder: Path, design: Design) -> Iterator[None]:
    """The folder of a comparison, made if need be, and this process's alone while the block runs.

    It may hold runs of other seeds, configurations or values: what is the same is not trained again.

    Raises:
        DesignError: It holds something else, or a run of another configuration, or another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as claims:
        try:
            claims.enter_context(locked(folder))
        except BlockingIOError as error:
            raise DesignError(f"another process makes the comparison in {folder}") from error
        _prepare(folder, design)
        yield


def _prepare(folder: Path, design: Design) -> None:
    spec, known = folder / _SPEC, dict[str, str]()
    if spec.exists():
        known = _read(spec, "jobs", dict, "a comparison")
    elif others := [each.name for each in folder.iterdir() if not each.name.startswith(".")]:
        raise DesignError(f"{folder} holds {others[0]}, and no comparison; --out FOLDER takes another folder")
    for job in design.jobs:
        is_begun = (folder / "runs" / job.name).exists() or code_of(folder, job) is not None
        if is_begun and known.get(job.name, job.digest) != job.digest:
            raise DesignError(
                f"{folder} holds {job.name} of another configuration: a file or an override was edited since;"
                " --out FOLDER takes another folder"
            )
    # First, so that a folder in which anything else lies is known as a comparison's.
    write_json(spec, {"methods": design.methods, "jobs": known | {job.name: job.digest for job in design.jobs}})
    for part in (_DONE, _LOGS, "runs"):
        (folder / part).mkdir(exist_ok=True)


def code_of(folder: Path, job: Job) -> int | None:
    """The exit code of a run that is done; None if it is not.

    Raises:
        DesignError: The file that says so is damaged.
    """
    file = folder / _DONE / f"{job.name}.json"
    return _read(file, "code", int, "a run that is done") if file.exists() else None


def _read(file: Path, key: str, kind: type[_T], what: str) -> _T:
    try:
        found = read_json(file).get(key)
    except JsonFileError as error:
        raise DesignError(str(error)) from error
    if not isinstance(found, kind):
        raise DesignError(f"{file} is damaged; expected what mtl compare wrote of {what}")
    return found


def train_all(folder: Path, design: Design, num_at_once: int, log: Callable[[str], None]) -> list[Failure]:
    """Trains what is not done yet.

    A process that is killed leaves a run that resumes when the comparison is started again. If this process is killed,
    so are those of the runs.

    Args:
        folder: That of the comparison.
        design: The comparison.
        num_at_once: Runs that train at the same time, in separate processes.
        log: Prints a line for each run that has ended.

    Returns:
        The runs that failed.
    """
    left = [job for job in design.jobs if code_of(folder, job) is None]
    failures, num_done = list[Failure](), len(design.jobs) - len(left)
    threads = _threads(num_at_once)
    with _ending() as running:
        while left or running:
            while left and len(running) < num_at_once:
                job = left.pop(0)
                running[_start(folder, job, threads)] = job
            for process in [each for each in running if each.poll() is not None]:
                job = running.pop(process)
                if process.returncode in _ENDED:
                    num_done += 1
                    write_json(folder / _DONE / f"{job.name}.json", {"code": process.returncode})
                    log(f"{job.name}: done ({num_done} of {len(design.jobs)})")
                    continue
                failures.append(Failure(job, process.returncode, _message(_log(folder, job))))
                log(f"{job.name}: failed, exit code {process.returncode}: {failures[-1].message}")
            time.sleep(0.1)
    return failures


def command_of(job: Job) -> list[str]:
    """The command that trains a run, without the interpreter."""
    return ["-m", "mtl", "train", "-q", str(job.file), *job.overrides]


def _start(folder: Path, job: Job, threads: dict[str, str]) -> subprocess.Popen[bytes]:
    with _log(folder, job).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, *command_of(job)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**threads, **os.environ},
            preexec_fn=_end_with_parent,
        )


def _end_with_parent() -> None:
    """On Linux, the system kills a run's process when this one ends, however that is."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _threads(num_at_once: int) -> dict[str, str]:
    """Threads for each of several processes, where the user has set none."""
    return {} if num_at_once == 1 else {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // num_at_once))}


@contextmanager
def _ending() -> Iterator[dict[subprocess.Popen[bytes], Job]]:
    """Processes that are asked to end, and waited for, when the block is left: they save, and resume later."""
    running: dict[subprocess.Popen[bytes], Job] = {}
    try:
        yield running
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def _log(folder: Path, job: Job) -> Path:
    return folder / _LOGS / f"{job.name}.txt"


def _message(file: Path) -> str:
    """Why a run failed: the last error that it printed, else its last line."""
    lines: Sequence[str] = [line.strip() for line in file.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return next(reversed([*lines, *errors]), "it printed nothing")
