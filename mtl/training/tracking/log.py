"""What a run logs: rows of numbers, the files that say what has happened, and lines on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from mtl.audit import Report
from mtl.distributed.world import World
from mtl.phases.resolve import Phase
from mtl.phases.scheduler import PhaseChange
from mtl.runtime.console import logger, progress_bar
from mtl.runtime.files import write_json
from mtl.training.nonfinite import NotFiniteError
from mtl.training.setup import RunSetup
from mtl.training.tracking.dashboard import Dashboard
from mtl.training.tracking.gradients import GradientLog
from mtl.training.tracking.messages import log_balance, log_epoch, log_idle_tasks, log_unreached
from mtl.training.tracking.steps import StepLog
from mtl.training.tracking.tracker import Tracker


class RunLog:
    """One for each run. Files are written by rank 0.

    Attributes:
        dashboard: What a backend shows besides the rows.
    """

    def __init__(self, setup: RunSetup, run_dir: Path, tracker: Tracker, quiet: bool, world: World) -> None:
        self.run_dir = run_dir
        self._setup = setup
        self._tracker = tracker
        self._quiet = quiet
        self._is_main = world.is_main
        self.dashboard = Dashboard(setup, run_dir, tracker, world)
        self._gradients = GradientLog(tracker, setup.model.trunk, setup.config.audit.gradients_every_steps)
        # Where layers speak to other processes in their backward, all have to go through it.
        self._is_analysed = world.is_main or setup.config.distributed.sync_batchnorm

    def phase_begins(self, phase: Phase) -> None:
        log_idle_tasks(self._setup, phase)
        log_balance(self._setup, phase)
        if phase.freeze.unreached:
            log_unreached(self._setup, phase)

    def phase_ended(self, change: PhaseChange, report: Report) -> None:
        self.audit(report)
        logger.info(f"{change.ended}: {change.reason}" + (f"; next phase: {change.entered}" if change.entered else ""))

    def audit(self, report: Report) -> None:
        """Writes `audit.json` as far as it is known."""
        self.write("audit.json", report.to_json())

    def results(self, content: Mapping[str, Any]) -> None:
        """Writes `results.json`: what the run has come to so far."""
        self.write("results.json", content)

    def not_finite(self, error: NotFiniteError, epoch: int) -> None:
        """Alerts, and writes `not_finite.json`: the images of a step whose loss or gradient is NaN or infinite."""
        self.dashboard.not_finite(error)
        self.write("not_finite.json", error.to_json(epoch))

    def left_out(self, error: NotFiniteError) -> None:
        """Warns of a step that is left out, and alerts of the first one."""
        logger.warning(f"{error.fact}: the step is left out")
        self.dashboard.not_finite(error, is_skipped=True)

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        if self._is_main:
            write_json(self.run_dir / name, content)

    def steps_of(self, phase: Phase, epoch: int, sums: Mapping[str, float] | None, has_scaler: bool) -> StepLog:
        """The log of an epoch's steps, continued from its sums if it was resumed."""
        every = self._setup.config.tracking.log_every_steps
        log = StepLog(self._tracker, every, phase.name, epoch, has_scaler, self.dashboard.number_of(phase))
        if sums is not None:
            log.load_state_dict(sums)
        return log

    def progress_bar(self, phase: Phase, epoch: int) -> tqdm[Any]:
        total = phase.order.num_batches(phase.batch_size) * min(phase.batch_size, phase.order.num_images)
        return progress_bar(total, f"{phase.name} epoch {epoch}", self._quiet)

    def analyse_from(self, phase: Phase, first_step: int) -> None:
        """The tasks' gradients are analysed on this step, and at a cadence after it."""
        self._gradients.enter(phase.name, phase.tasks, first_step)

    def task_gradients(self, losses: Mapping[str, Tensor], step: int, log: StepLog) -> None:
        """Analyses the tasks' gradients if it is time; call it before the backward."""
        if self._is_analysed:
            self._gradients.before_backward(losses, step, log)

    def epoch(self, row: Mapping[str, Any], report: Report) -> None:
        """Logs a validation, and alerts of what the audit has found."""
        self._tracker.log(row)
        self._tracker.show_waiting()
        self.dashboard.found(report, row["step"])

    def epoch_line(self, row: Mapping[str, Any], log: StepLog | None) -> None:
        log_epoch(self._setup, row, log)
