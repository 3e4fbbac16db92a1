"""One guard around every verb: a known error is one message and an exit code; an error of ours keeps its traceback.

Nothing is imported here that takes time: a Ctrl-C while torch is imported is met by the same guard.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mtl.cli.verb import FAILED, VIOLATION, WRONG_INPUT
from mtl.runtime.signals import raised_signals

if TYPE_CHECKING:
    from mtl.config import RunConfig
    from mtl.distributed.world import World
    from mtl.phases.plan import Plan


@dataclass
class Attempt:
    """How far a verb has come, which decides what is printed when it ends early.

    Attributes:
        trains: Whether it trains, and so saves.
        config: The run, once its configuration is read.
        world: The processes that train together, once they are known.
        plan: The run's, once all its parts are there; training begins then.
        is_trained: Whether training is over, and everything saved.
    """

    trains: bool = False
    config: RunConfig | None = None
    world: World | None = None
    plan: Plan | None = None
    is_trained: bool = False


def guarded(verb: Callable[[Attempt], int]) -> int:
    """Runs a verb to its exit code.

    Returns:
        What the verb returns; 2 if the user's input is wrong, 3 if the audit found a violation, 1 if it was stopped or
        the machine did not let it finish. Errors of ours are raised, which makes 1.
    """
    _open_closed_streams()
    attempt = Attempt()
    with raised_signals():
        try:
            return _flushed(verb, attempt)
        except KeyboardInterrupt as signal:
            return _end(FAILED, f"\nstopped by {signal.args[0] if signal.args else 'SIGINT'}", attempt)
        except Exception as error:
            code = _explain(error, attempt)
            if code is None:
                raise
            return code


def _flushed(verb: Callable[[Attempt], int], attempt: Attempt) -> int:
    """Runs a verb, and flushes standard output: what is left in it would fail later, where nobody can catch it."""
    from mtl.runtime.console import flush_stdout

    try:
        code = verb(attempt)
    except SystemExit:  # argparse has printed help or a version
        flush_stdout()
        raise
    flush_stdout()
    return code


def _open_closed_streams() -> None:
    """Puts something in place of standard streams that are closed.

    The next file that is opened would get their number, and what is meant for the user would be written into it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # A write to standard output fails as it would if it were closed; one to standard error has no reader.
            number = os.open(os.devnull, os.O_WRONLY if name == "stderr" else os.O_RDONLY)
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115  a descriptor, permanently


def _explain(error: Exception, attempt: Attempt) -> int | None:
    """Prints what a known error means and what to do; its exit code, or None for any other."""
    from mtl.config.errors import ConfigError
    from mtl.runtime.console import OutputError, discard

    if isinstance(error, ConfigError):
        return _end(WRONG_INPUT, "\n".join(f"error: {line}" for line in error.mistakes))
    if isinstance(error, OutputError):
        discard(sys.stdout)
        return _end(FAILED, f"error: {error}", attempt)
    return _explain_by_parts(error, attempt) if "torch" in sys.modules else None


def _explain_by_parts(error: Exception, attempt: Attempt) -> int | None:
    """As `_explain`, for errors whose classes are imported together with torch."""
    from mtl.audit import AuditError
    from mtl.checkpoint.files import CheckpointError
    from mtl.checkpoint.folder import SaveError
    from mtl.checkpoint.run_files import RunFileError
    from mtl.checkpoint.tensor_file import UnreadableError
    from mtl.cli.out_of_memory import in_words, is_out_of_memory
    from mtl.config import SettingError
    from mtl.data import DataError
    from mtl.distributed.world import WorldError, is_lost
    from mtl.runtime.files import in_one_line, is_full, is_of_the_machine
    from mtl.runtime.signals import Stopped
    from mtl.training.nonfinite import NotFiniteError
    from mtl.training.run import audit_file

    if isinstance(error, AuditError) and attempt.config is not None and attempt.world is not None:
        return _end(VIOLATION, f"error: audit: {error}\nSee {audit_file(attempt.config.run_dir, attempt.world)}")
    if isinstance(error, WorldError | SettingError | UnreadableError | RunFileError):
        return _end(WRONG_INPUT, f"error: {error}")
    if isinstance(error, DataError | CheckpointError | NotFiniteError | SaveError):
        # In the middle of training, it is no longer what the user has written.
        return _end(WRONG_INPUT if attempt.plan is None else FAILED, f"error: {error}", attempt)
    if isinstance(error, Stopped):
        return _end(FAILED, f"\n{error}", attempt)
    if is_full(error):
        return _end(FAILED, f"error: the disk is full: {error}", attempt)
    if is_out_of_memory(error):
        return _end(FAILED, f"error: {in_words(error, attempt.plan)}", attempt)
    if attempt.world is not None and not attempt.world.is_alone and is_lost(error):
        return _end(FAILED, f"error: Another rank exited; see its log. ({error})", attempt)
    if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR, errno.ENOTDIR):
        # A path that somebody wrote; nobody else makes such ones.
        return _end(WRONG_INPUT, f"error: {in_one_line(error)}")
    if is_of_the_machine(error):
        return _end(FAILED, f"error: {in_one_line(error)}", attempt)
    return None


def _end(code: int, message: str, attempt: Attempt | None = None) -> int:
    """Prints why it ended and, of a run that trained, what is saved; returns the code."""
    from mtl.runtime.console import print_err

    print_err(message)
    if attempt is None or not attempt.trains or (code == WRONG_INPUT):
        return code
    run_dir = None if attempt.config is None else attempt.config.run_dir
    if attempt.is_trained:
        print_err(f"Training is complete and saved. To write the report: mtl report {run_dir}")
    elif run_dir is not None and (run_dir / "checkpoints" / "last").exists():
        # Where the name is not as it was written, it was made for this run.
        is_own = attempt.config is not None and attempt.config.source.data.get("name") != attempt.config.name
        print_err(f"To resume, rerun with {f'name={run_dir.name} ' if is_own else ''}resume=auto.")
    else:
        print_err("Nothing was saved yet.")
    return code
