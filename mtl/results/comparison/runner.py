"""Trains the runs of a comparison, each in a process and directory of its own; what is done is not done again."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mtl.results.comparison.design import Design, DesignError, Job
from mtl.runtime.files import write_json

_SPEC, _DONE, _LOGS = "comparison.json", "done", "logs"
# What `mtl train` ends with: done, and done with a violation. Anything else is not done.
_ENDED = (0, 3)


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

    Raises:
        DesignError: It is another comparison's, holds something else, or another process has it.
    """
    _prepare(folder, design)
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DesignError(f"another process makes the comparison in {folder}") from error
        yield
    finally:
        os.close(lock)


def _prepare(folder: Path, design: Design) -> None:
    spec = folder / _SPEC
    if spec.exists():
        try:
            known = json.loads(spec.read_text())["digest"]
        except (ValueError, KeyError, TypeError) as error:
            raise DesignError(f"{spec} is damaged; expected the file that a comparison wrote") from error
        if known != design.digest:
            raise DesignError(
                f"{folder} holds another comparison: its configurations, grid, seeds or baselines differ, or were"
                " edited since; --out FOLDER takes another folder"
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise DesignError(f"{folder} is not empty, and holds no comparison; --out FOLDER takes another folder")
    for part in (_DONE, _LOGS, "runs"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    write_json(spec, {"digest": design.digest, "methods": design.methods, "jobs": [job.name for job in design.jobs]})


def code_of(folder: Path, job: Job) -> int | None:
    """The exit code of a run that is done; None if it is not."""
    file = folder / _DONE / f"{job.name}.json"
    code: int | None = json.loads(file.read_text())["code"] if file.exists() else None
    return code


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
        The runs that failed; wrong input (exit code 2) ends all, since it is wrong for all seeds.
    """
    left = [job for job in design.jobs if code_of(folder, job) is None]
    failures, num_done = list[Failure](), len(design.jobs) - len(left)
    threads = _threads(num_at_once)
    with _ending() as running:
        while left or running:
            while left and len(running) < num_at_once:
                job = left.pop(0)
                running[_start(folder, design, job, threads)] = job
            for process in [each for each in running if each.poll() is not None]:
                job = running.pop(process)
                if process.returncode in _ENDED:
                    num_done += 1
                    write_json(folder / _DONE / f"{job.name}.json", {"code": process.returncode})
                    log(f"{job.name}: done ({num_done} of {len(design.jobs)})")
                    continue
                failures.append(Failure(job, process.returncode, _last_line(_log(folder, job))))
                log(f"{job.name}: failed, exit code {process.returncode}: {failures[-1].message}")
                if process.returncode == 2:
                    return failures
            time.sleep(0.1)
    return failures


def command_of(design: Design, job: Job) -> list[str]:
    """The command that trains a run, without the interpreter."""
    own = [f"name={job.name}", f"seed={job.seed}", *design.run_keys[job.name]]
    return ["-m", "mtl", "train", "-q", str(job.file), *job.overrides, *own]


def _start(folder: Path, design: Design, job: Job, threads: dict[str, str]) -> subprocess.Popen[bytes]:
    with _log(folder, job).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, *command_of(design, job)],
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


def _last_line(file: Path) -> str:
    lines: Sequence[str] = [line for line in file.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it printed nothing"
