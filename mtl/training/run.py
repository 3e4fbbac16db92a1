"""A run from its first file to its last: its directory, tracking, resume, training, and the audit."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from mtl.audit import AuditError
from mtl.checkpoint.run_files import DATA
from mtl.config.yaml_text import dump_yaml
from mtl.distributed.sync_batchnorm import synchronise
from mtl.distributed.world import ALONE, World
from mtl.model.fsdp import shard_with_groups
from mtl.phases.metrics import RunMetrics
from mtl.runtime.console import logger
from mtl.runtime.files import write_json, write_text
from mtl.runtime.signals import Interrupt
from mtl.runtime.text import shorten
from mtl.training.data_record import data_record, what_was_edited
from mtl.training.history import History
from mtl.training.loop import Trainer
from mtl.training.nonfinite import NotFiniteError
from mtl.training.result import RunResult
from mtl.training.resume import ResumeSource, Resumption, resume_from, resumed_config, what_is_overridden
from mtl.training.run_dir import claimed_run_dir
from mtl.training.setup import RunSetup
from mtl.training.tracking.messages import log_classic_freeze, warn_of_dead_branches
from mtl.training.tracking.tracker import Tracker


def train(setup: RunSetup, quiet: bool = False, world: World = ALONE, source: ResumeSource | None = None) -> RunResult:
    """Trains through all phases and writes the run directory.

    Args:
        setup: The parts of the run.
        quiet: Whether to show no progress bar.
        world: The processes that train together; rank 0 writes.
        source: Where the run resumes from, if `resumed_config` has found it already.

    Raises:
        ConfigError: The run directory cannot be made, or there is nothing to resume from.
        AuditError: The freeze was broken, and the audit's policy is to raise; `audit.json` says how.
        NotFiniteError: A loss or a gradient is not finite, and the policy is to raise; `not_finite.json` says for which
            images.
        SaveError: A checkpoint cannot be written.
        Stopped: It was asked to end, and has saved its state.
    """
    config = setup.config
    if source is None:
        _, source = resumed_config(config)
    if source is None and world.is_main:
        warn_of_dead_branches(setup)
    if config.distributed.strategy == "fsdp2":
        # From here on each process holds its shard of every parameter; objects that keep parameters are made later.
        shard_with_groups(setup.model, [phase.groups for phase in setup.phases], world)
    if config.distributed.sync_batchnorm:
        synchronise(setup.model, world)
    # Each process keeps its part of what it reads, of optimizer state too.
    resumption = None if source is None else resume_from(source, setup, world)
    for line in what_is_overridden(config, source):
        logger.warning(f"resume: {line}")
    in_place = resumption is not None and resumption.in_place
    # Digests of a large data set take seconds: only who writes or compares them makes them.
    record = data_record(setup) if world.is_main or in_place else {}
    if in_place:
        _compare_data(setup, record)
    with _directory(setup, in_place, world) as run_dir, Interrupt(not world.is_alone) as asked:
        history = History(config.command, taken=setup.taken) if resumption is None else resumption.history
        tracker = _start_files(setup, run_dir, resumption if in_place else None, history, record, world)
        trainer = Trainer(setup, run_dir, tracker, quiet, asked, world, history)
        with _audited(trainer, run_dir, world):
            if resumption is not None:
                trainer.restore(resumption)
            if not in_place:
                trainer.log.dashboard.begin(trainer.state.step)
            result = trainer.run()
            result.asked_to_end = asked.name
            return result


@contextmanager
def _audited(trainer: Trainer, run_dir: Path, world: World) -> Iterator[None]:
    """Writes the audit and ends tracking, however the run inside ends."""
    ended: dict[str, Any] = {}
    is_finished = False
    try:
        yield
        is_finished = True
    except AuditError:
        ended = {"ended_the_run": True}
        raise
    except NotFiniteError as error:
        # The weights of that moment are of no use; the images may be.
        with _even_if_full():
            trainer.log.not_finite(error, trainer.state.epoch)
        raise
    finally:
        report = trainer.audit.report
        content = report.to_json() | ended
        # The error that ended the run is reported, not that there is no room to write it down.
        with nullcontext() if is_finished else _even_if_full():
            trainer.log.write("audit.json", content)
            if not world.is_main and report.violations:
                # What one process alone has found is in no other one's report.
                write_json(audit_file(run_dir, world), content)
        state, dashboard = trainer.state, trainer.log.dashboard
        dashboard.found(report, state.step)
        best = (state.best.score, state.best.step)
        dashboard.end(state.scores, report, best, state.step, failed=not is_finished)


def _compare_data(setup: RunSetup, record: dict[str, Any]) -> None:
    """Raises `ConfigError` if the data is not what the run began with; with `resume_override`, warns."""
    config = setup.config
    edited = what_was_edited(config.run_dir, record)
    if not edited:
        return
    message = f"the data was edited since the run began ({shorten(edited, 5)})"
    if not config.resume_override:
        raise config.mistake(("resume",), f"{message}; resume_override=true resumes with what it is now")
    logger.warning(f"resume: {message}")


@contextmanager
def _even_if_full() -> Iterator[None]:
    """Warns of a file that could not be written, and continues."""
    try:
        yield
    except OSError as error:
        logger.warning(f"{error.filename or 'a file of the run'} cannot be written: {error.strerror}")


def audit_file(run_dir: Path, world: World) -> Path:
    """The path of a process's audit; that of rank 0 is the run's."""
    return run_dir / ("audit.json" if world.is_main else f"audit.rank-{world.rank}.json")


@contextmanager
def _directory(setup: RunSetup, in_place: bool, world: World) -> Iterator[Path]:
    """The run directory, which rank 0 claims before any other rank continues."""
    if not world.is_main:
        world.barrier()
        yield setup.config.run_dir
        return
    with claimed_run_dir(setup.config, resumes=in_place) as run_dir:
        world.barrier()
        yield run_dir


def _start_files(
    setup: RunSetup,
    run_dir: Path,
    resumption: Resumption | None,
    history: History,
    record: dict[str, Any],
    world: World,
) -> Tracker:
    """Writes what is known before training, and starts tracking."""
    config = setup.config
    resolved = config.model_dump(mode="json", exclude_none=True)
    if world.is_main:
        for file in run_dir.glob("audit.rank-*.json"):
            file.unlink()
        # First, so that no setting is there whose change is not.
        write_json(run_dir / "history.json", history.to_json())
        write_text(run_dir / "config.yaml", dump_yaml(resolved))
        write_json(run_dir / "plan.json", setup.plan.to_json())
        write_json(run_dir / DATA, record)
        log_classic_freeze(setup)
        for line in setup.unread:
            logger.warning(line)
    wandb_id = None if resumption is None else resumption.state["wandb_id"]
    tracker = Tracker(
        config.tracking,
        run_dir,
        config.name,
        resolved,
        wandb_id,
        is_silent=not world.is_main,
        directions=RunMetrics(config, setup.tasks).directions,
        step=0 if resumption is None else resumption.state["step"],
    )
    logger.log(logging.WARNING if tracker.is_less else logging.INFO, tracker.message)
    return tracker
