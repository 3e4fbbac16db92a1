"""The run directory: made for one run alone, or gone on with, and used by one process at a time."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from mtl.checkpoint.run_files import RunFileError, read_state_file
from mtl.config import RunConfig
from mtl.config.names import AUTO
from mtl.runtime.console import logger
from mtl.runtime.files import dead_link
from mtl.runtime.lock import locked
from mtl.runtime.text import shorten

# Lies in every run directory of ours from its first moment on; what lies in other directories is not ours to touch.
MARK = ".mtl-run"
# Files of a run that never reached a checkpoint.
_CHECKPOINT = re.compile(r"step-\d{8,}|\.step-\d{8,}\.old")
_OF_A_START = (
    *("metrics.jsonl", "audit*.json", "plan.json", "history.json", "data.json", "results.json", "report.html"),
)


def resumes_in_place(config: RunConfig) -> bool:
    """Whether a run resumes in its own directory, which holds files of it already."""
    if config.resume is None or config.name == AUTO or not _is_run(config.run_dir):
        return False
    own = [config.run_dir, config.run_dir / "checkpoints", config.run_dir / "checkpoints" / "last"]
    return config.resume == "auto" or Path(config.resume).resolve() in [path.resolve() for path in own]


def _is_run(run_dir: Path) -> bool:
    """Whether a run of ours has written here: one has left its mark, or, before there were marks, a checkpoint."""
    if (run_dir / MARK).is_file():
        return True
    return any(
        _is_of_a_checkpoint(file)
        for file in (run_dir / "checkpoints").glob("*step-*/state.json")
        if _CHECKPOINT.fullmatch(file.parent.name)
    )


def _is_of_a_checkpoint(file: Path) -> bool:
    """Whether a file is the state of a run of ours, as each checkpoint has one."""
    try:
        state = read_state_file(file)
    except RunFileError:
        return False
    return {"step", "phases", "scheduler", "audit", "config", "digests"} <= state.keys()


def check_run_dir(config: RunConfig) -> None:
    """Raises `ConfigError` if the run directory is taken or cannot be made, or its checkpoints cannot be seen."""
    if config.name == AUTO:
        if config.resume == "auto":
            raise config.mistake(
                ("resume",), "name=auto begins a run with a name of its own; to resume one, give its name"
            )
        _check_parent(config, Path(config.runs_dir))
        return
    run_dir = config.run_dir
    try:
        if why := dead_link(run_dir):
            raise config.mistake(("name",) if run_dir.is_symlink() else ("runs_dir",), f"{run_dir} cannot be made{why}")
        run_dir.exists()
    except OSError as error:
        raise config.mistake(("runs_dir",), f"{run_dir} cannot be made: {error.strerror}") from error
    if run_dir.exists() and not run_dir.is_dir():
        raise config.mistake(("name",), f"{run_dir} is a file; expected a directory, or nothing yet")
    if run_dir.is_dir() and any(run_dir.iterdir()) and not resumes_in_place(config):
        number = 2
        while config.run_dir.with_name(f"{config.name}-{number}").exists():
            number += 1
        is_run, is_auto = _is_run(run_dir), config.resume == "auto"
        what = "a run" if is_run else "files, but no run to resume" if is_auto else "files"
        raise config.mistake(
            ("name",),
            f"{run_dir} already holds {what}; give this one another name, such as name={config.name}-{number}"
            + (", or resume that one: resume=auto" if is_run and config.resume is None else ""),
        )
    if run_dir.is_dir():
        _check_checkpoints(config)
    _check_parent(config, run_dir)


def _check_parent(config: RunConfig, run_dir: Path) -> None:
    """Raises `ConfigError` if a directory cannot be made, or what is there cannot be written to."""
    parent = next(folder for folder in [run_dir, *run_dir.absolute().parents] if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise config.mistake(
            ("runs_dir",), f"{run_dir} cannot be made: {parent} is not a directory that you may write to"
        )


def _check_checkpoints(config: RunConfig) -> None:
    """Raises `ConfigError` if there may be checkpoints that cannot be seen: a run would start over them."""
    folder = config.run_dir / "checkpoints"
    try:
        names = sorted(path.name for path in folder.iterdir())
        # What a first checkpoint leaves that was broken off is ours to clear away, and nothing else is.
        others = [name for name in names if not name.startswith(".") and name != "frozen"]
        if others and not any(map(_CHECKPOINT.fullmatch, names)):
            raise config.mistake(
                ("resume",),
                f"{folder} holds {shorten(others, 3)}, and no checkpoint to resume from (step-00000010 and the like);"
                " a run would start from scratch over it: move it away first, or give another name",
            )
    except FileNotFoundError:
        if folder.is_symlink():
            raise config.mistake(
                ("resume",), f"{folder} is a link to {folder.readlink()}, which is not there; is its disk mounted?"
            ) from None
    except OSError as error:
        raise config.mistake(
            ("resume",), f"{folder} cannot be read ({error.strerror}), so no checkpoint can be found; make it readable"
        ) from error


@contextmanager
def own_name(config: RunConfig, is_main: bool, broadcast: Callable[[str | None], str]) -> Iterator[RunConfig]:
    """The configuration with a name for its run: with `name: auto`, that of its file and the next free number.

    The directory is made at once, so that runs that begin together have different names; it is removed again if
    nothing is written to it while the block runs.

    Args:
        config: The run.
        is_main: Whether this is the process that chooses.
        broadcast: Gives every process what that one passes.

    Raises:
        ConfigError: The directory cannot be made.
    """
    if config.name != AUTO:
        yield config
        return
    config = config.with_changes(name=broadcast(_make_next(config) if is_main else None))
    try:
        yield config
    finally:
        if is_main:
            with suppress(OSError):
                # Fails if it is not empty.
                config.run_dir.rmdir()


def _make_next(config: RunConfig) -> str:
    """Makes a directory whose name nobody has; returns the name."""
    runs = Path(config.runs_dir)
    stem = re.sub(r"[^\w.\-]", "-", config.source.file.stem if config.source.file else "run").lstrip(".")[:100] or "run"
    try:
        runs.mkdir(parents=True, exist_ok=True)
        taken = [re.fullmatch(rf"{re.escape(stem)}-(\d+)", path.name, re.ASCII) for path in runs.iterdir()]
        number = max((int(found[1]) for found in taken if found), default=0)
        while True:
            number += 1
            with suppress(FileExistsError):
                (runs / f"{stem}-{number:03d}").mkdir()
                return f"{stem}-{number:03d}"
    except OSError as error:
        raise config.mistake(("runs_dir",), f"{runs} cannot be written to: {error.strerror}") from error


@contextmanager
def claimed_run_dir(config: RunConfig, resumes: bool) -> Iterator[Path]:
    """The run directory, made if need be, and this process's alone while the block runs.

    Args:
        config: The run.
        resumes: Whether it resumes from a checkpoint in it. If not, files of a run that never reached a checkpoint are
            removed.

    Raises:
        ConfigError: It cannot be made, or another process has it.
    """
    is_new = not resumes_in_place(config)
    with ExitStack() as claims:
        try:
            config.run_dir.mkdir(parents=True, exist_ok=True)
            claims.enter_context(locked(config.run_dir))
            if is_new and any(config.run_dir.iterdir()):
                raise BlockingIOError
            (config.run_dir / MARK).touch()
        except BlockingIOError as error:
            raise config.mistake(("name",), f"another process is training in {config.run_dir}") from error
        except OSError as error:
            raise config.mistake(("runs_dir",), f"{config.run_dir} cannot be made: {error.strerror}") from error
        if not is_new and not resumes:
            if (config.run_dir / "metrics.jsonl").exists():
                logger.warning(
                    f"{config.run_dir} has no checkpoint: the run starts from scratch, and its metrics with it"
                )
            for file in (file for name in _OF_A_START for file in config.run_dir.glob(name)):
                file.unlink(missing_ok=True)
            shutil.rmtree(config.run_dir / "checkpoints", ignore_errors=True)
        yield config.run_dir
