"""A run from its first file to its last: the directory, tracking, where it goes on from, training, and the audit."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from mtl.audit import AuditError
from mtl.config.yaml_text import dump_yaml
from mtl.distributed.sync_batchnorm import synchronise
from mtl.distributed.world import ALONE, World
from mtl.model.fsdp import shard_with_groups
from mtl.runtime.console import logger
from mtl.runtime.files import write_json, write_text
from mtl.runtime.signals import Interrupt
from mtl.training.history import History
from mtl.training.loop import Trainer
from mtl.training.nonfinite import NotFiniteError
from mtl.training.result import Outcome
from mtl.training.resume import Resumption, find_origin, resume_from, settled, what_is_overridden
from mtl.training.run_dir import claimed_run_dir
from mtl.training.setup import Parts
from mtl.training.tracking.messages import announce_classic, warn_of_dead_branches
from mtl.training.tracking.tracker import Tracker


def train(parts: Parts, quiet: bool = False, world: World = ALONE) -> Outcome:
    """Trains through all phases and writes the run directory.

    Args:
        parts: The parts of the run.
        quiet: Whether to show no progress bar.
        world: The processes that train together; the first one writes.

    Raises:
        ConfigError: The run directory cannot be made, or there is nothing to resume from.
        AuditError: The freeze was broken, and the audit's policy is to raise; `audit.json` says how.
        NotFiniteError: A loss or a gradient is not finite, and the policy is to raise; `not_finite.json` says for which
            images.
        SaveError: A checkpoint cannot be written.
        Stopped: It was asked to end, and has saved where it stands.
    """
    origin = find_origin(parts.config)
    if origin is not None:
        settled(parts.config, origin)
    if origin is None and world.leads:
        warn_of_dead_branches(parts)
    if parts.config.distributed.strategy == "fsdp2":
        # From here on each process holds its part of every parameter; whoever keeps parameters is made after this.
        shard_with_groups(parts.model, [phase.groups for phase in parts.phases], world)
    if parts.config.distributed.sync_batchnorm:
        synchronise(parts.model, world)
    # Each process keeps its part of what it reads, of moments too.
    resumption = None if origin is None else resume_from(origin, parts, world)
    for line in what_is_overridden(parts.config, origin):
        logger.warning(f"resume: {line}")
    in_place = resumption is not None and resumption.in_place
    with _directory(parts, in_place, world) as run_dir, Interrupt(not world.is_alone) as asked:
        history = History(parts.config.command) if resumption is None else resumption.history
        tracker = _start_files(parts, run_dir, resumption if in_place else None, history, world)
        trainer = Trainer(parts, run_dir, tracker, quiet, asked, world, history)
        ended: dict[str, Any] = {}
        try:
            if resumption is not None:
                trainer.take_up(resumption)
            outcome = trainer.run()
            outcome.asked_to_end = asked.name
            return outcome
        except AuditError:
            ended = {"ended_the_run": True}
            raise
        except NotFiniteError as error:
            # The weights of that moment are of no use; the images may be.
            with _even_if_full():
                trainer.write_json("not_finite.json", error.to_json(trainer.epoch))
            raise
        finally:
            report = trainer.audit.report
            content = report.to_json() | ended
            # What ended the run is what is to be said, not that there is no room to write it down.
            with nullcontext() if trainer.finished else _even_if_full():
                trainer.write_json("audit.json", content)
                if not world.leads and report.violations:
                    # What one process alone has found is in no other one's report.
                    write_json(audit_file(run_dir, world), content)
            tracker.finish(
                {"audit/ok": report.ok, "val/best_score": trainer.outcome.best_score}, failed=not trainer.finished
            )


@contextmanager
def _even_if_full() -> Iterator[None]:
    """Says that a file could not be written, and goes on."""
    try:
        yield
    except OSError as error:
        logger.warning(f"{error.filename or 'a file of the run'} cannot be written: {error.strerror}")


def audit_file(run_dir: Path, world: World) -> Path:
    """Where the audit of a process is found: that of the first one is the run's."""
    return run_dir / ("audit.json" if world.leads else f"audit.rank-{world.rank}.json")


@contextmanager
def _directory(parts: Parts, in_place: bool, world: World) -> Iterator[Path]:
    """The run directory, which the first process claims before any other one goes on."""
    if not world.leads:
        world.barrier()
        yield parts.config.run_dir
        return
    with claimed_run_dir(parts.config, go_on=in_place) as run_dir:
        world.barrier()
        yield run_dir


def _start_files(parts: Parts, run_dir: Path, resumption: Resumption | None, history: History, world: World) -> Tracker:
    """Writes what is known before training, and starts tracking."""
    config = parts.config
    resolved = config.model_dump(mode="json", exclude_none=True)
    if world.leads:
        for file in run_dir.glob("audit.rank-*.json"):
            file.unlink()
        # First, so that no setting is there whose change is not.
        write_json(run_dir / "history.json", history.to_json())
        write_text(run_dir / "config.yaml", dump_yaml(resolved))
        write_json(run_dir / "plan.json", parts.plan.to_json())
        announce_classic(parts)
        for line in parts.unread:
            logger.warning(line)
    wandb_id = None if resumption is None else resumption.state["wandb_id"]
    tracker = Tracker(config.tracking, run_dir, config.name, resolved, wandb_id, is_silent=not world.leads)
    logger.log(logging.WARNING if tracker.is_less else logging.INFO, tracker.message)
    return tracker
