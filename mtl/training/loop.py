"""The training loop: through the phases, and in each through its epochs; a step is `mtl.training.step`'s."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, Never

from torch.amp import GradScaler

from mtl.audit import GradientAudit, HoldsParameters, PhaseRecord
from mtl.data import Batch, Loading, num_batches, training_batches
from mtl.distributed.world import ALONE, World
from mtl.freeze import enforce, is_frozen
from mtl.patterns import text_of
from mtl.phases.resolve import Phase
from mtl.phases.scheduler import PhaseChange, TaskScheduler
from mtl.runtime.console import logger, progress_bar
from mtl.runtime.files import write_json
from mtl.runtime.rng import seed_process
from mtl.runtime.signals import Interrupt, Stopped
from mtl.training.autotune import autocast_for
from mtl.training.features import FeatureSource
from mtl.training.history import UNKNOWN, History
from mtl.training.keeper import Keeper, Stepping
from mtl.training.nonfinite import NotFiniteError
from mtl.training.objective import Objective
from mtl.training.result import Outcome
from mtl.training.resume import Resumption
from mtl.training.saver import Place, Saver, Within
from mtl.training.setup import Parts
from mtl.training.step import Stepper
from mtl.training.step_sync import Consensus, put_back
from mtl.training.tracking.gradients import GradientLog
from mtl.training.tracking.messages import tell_balance, tell_epoch, tell_idle_tasks, tell_unreached
from mtl.training.tracking.steps import StepLog
from mtl.training.tracking.tracker import Tracker
from mtl.training.validate import Validator

# Between steps, the audit looks so often at a trunk that is not run: a step takes less than a look at all of it.
_EVERY_RESTING = 20


class Trainer:
    """One run. `run` is the way in; everything else is called from there."""

    def __init__(
        self,
        parts: Parts,
        run_dir: Path,
        tracker: Tracker,
        quiet: bool,
        asked: Interrupt | None = None,
        world: World = ALONE,
        history: History = UNKNOWN,
    ) -> None:
        self.parts = parts
        self.config = parts.config
        self.tracker = tracker
        self.quiet = quiet or not world.leads
        self.world = world
        self.scheduler = TaskScheduler([phase.length for phase in parts.phases])
        self.audit = GradientAudit(parts.root, policy=parts.config.audit.policy, whole=True, strict=True)
        self.gradients = GradientLog(tracker, parts.model.trunk, parts.config.audit.gradients_every_steps)
        are_statistics_shared = parts.config.distributed.sync_batchnorm
        self.consensus = Consensus(world, self.audit, asked or Interrupt(), are_statistics_shared)
        self.keeper = Keeper(parts, run_dir / "checkpoints", world)
        self.autocast = autocast_for(parts.config.precision, parts.device)
        # Small gradients of fp16 would be zero: losses are multiplied, and what overflows is not stepped.
        self.scaler = GradScaler(parts.device.type, enabled=parts.config.precision == "fp16")
        self.features = FeatureSource(parts, self.autocast, self.quiet, world)
        self.objective = Objective(parts, self.features, self.autocast, self.scaler, world)
        self.outcome = Outcome(run_dir, parts.trivial, report=self.audit.report)
        self.saver = Saver(
            *(parts, self.keeper, tracker, self.scheduler, self.audit, self.features, self.scaler),
            *(self.outcome, self.consensus, world, history),
        )
        self.validate = Validator(parts, self.autocast, self.features, self.consensus, world)
        self.index = self.step = self.epoch = self.num_skipped = 0
        self.resumed: Resumption | None = None
        self.finished = False

    def take_up(self, resumption: Resumption) -> None:
        """Stands where a run stood when it wrote a checkpoint; its weights are in the model already."""
        state = resumption.state
        self.resumed = resumption
        self.index, self.step, self.epoch = state["phase_index"], state["step"], state["epoch"]
        self.num_skipped = state["num_skipped"]
        self.scheduler.load_state_dict(state["scheduler"])
        self.audit.load_state_dict(state["audit"])
        self.scaler.load_state_dict(resumption.memory["scaler"])
        self.keeper.take_up(resumption)
        self.features.load_state_dict(state["features"])
        self.outcome.scores, self.outcome.train_s = state["scores"], state["train_s"]
        if resumption.in_place:
            self.tracker.cut_back(state["metrics_bytes"])
        self.note_best()
        phase = self.parts.phases[self.index].name
        logger.info(f"resume: phase {phase!r} from step {self.step}, {resumption.folder}")

    def run(self) -> Outcome:
        self.outcome.started = time.perf_counter()
        if not self.world.is_alone:
            # Each process drops other units than the others.
            seed_process(self.config.seed, self.world.rank)
        index: int | None = self.index
        while index is not None:
            self.run_phase(index)
            index = self.scheduler.index
        self.outcome.train_s = self.outcome.seconds_so_far()
        self.finished = True
        return self.outcome

    def run_phase(self, index: int) -> None:
        """Enters a phase and trains until the scheduler ends it. The order of the entry matters: see each comment."""
        parts, phase = self.parts, self.parts.phases[index]
        self.index, resumed, self.resumed = index, self.resumed, None
        self.consensus.begin_phase()
        if phase.restore is not None and resumed is None:
            self.keeper.rewind(phase, *phase.restore)
        # Accumulation never crosses into a phase: windows end with the epoch or the phase, whichever comes first.
        # No gradient of the phase before, requires_grad by plan, and frozen modules in eval mode for good.
        enforce(parts.root, phase.freeze.plan)
        tell_idle_tasks(parts, phase)
        tell_balance(phase)
        if phase.freeze.unreached:
            tell_unreached(parts, phase)
        # Only what trains is in the optimizer: neither decay nor momentum can reach the rest.
        course = None if resumed is None else resumed.lr_schedule
        stepping = None if phase.config.evaluate_only else self.keeper.build_stepping(index, course)
        optimizers: list[HoldsParameters] = [] if stepping is None else [stepping.optimizer, phase.balance]
        # The audit is told the patterns, not the plan: it draws the line itself, and fingerprints what is behind it.
        # How many names they must match was the plan's affair: the audit counts plain tensor attributes as well.
        patterns = [text_of(pattern) for pattern in phase.freeze.patterns]
        # What no active task reaches is frozen, unless the user lets it be: then it is not asked to train.
        idle = () if self.config.unreached == "freeze" else phase.freeze.unreached
        written_at = phase.freeze.written_at
        with self.audit.phase(phase.name, patterns, optimizers, idle, written_at) as record:
            # From here on the file says that this phase began, and that nothing is proven of it yet.
            self.write_json("audit.json", self.audit.report.to_json())
            # What is frozen whole need not be recorded for a backward that never comes.
            parts.model.trunk_is_frozen = is_frozen(phase.freeze.plan, "trunk")
            if self.config.compile:
                parts.model.recompile()
            change = None if resumed is None else resumed.change
            within = None if resumed is None else resumed.state["within_epoch"]
            if change is None or within is not None:
                # What is frozen from the first layer on is computed once for each image, while the audit stands for it.
                done = self.scheduler.state_dict()["steps"]
                self.keep_features(
                    index, record, done, None if resumed is None else resumed.state["features"]["kept_in"]
                )
                self.gradients.enter(phase.name, phase.tasks, self.step + 1 - done)
            self.validate.begin_phase()
            if resumed is not None:
                # Last, since all that comes before may draw some.
                self.saver.take_up_own(resumed)
            while change is None or within is not None:
                change, within = self.run_epoch(phase, stepping, change, within), None
            phase.balance.after_phase()
            if stepping is not None:
                self.keeper.put_away(stepping)
            self.features.leave()
        self.write_json("audit.json", self.audit.report.to_json())
        logger.info(f"{change.ended}: {change.reason}" + (f"; next phase: {change.entered}" if change.entered else ""))

    def keep_features(self, index: int, record: PhaseRecord, steps_done: int, kept_in: str | None = None) -> None:
        """Decides what a phase, whose audit has begun, need not compute again; `kept_in` is what was decided before."""
        self.features.enter(index, record, lambda: self.consensus.holds, steps_done, kept_in)
        self.audit.look_every(_EVERY_RESTING if self.features.trunk_rests else 1)

    def run_epoch(
        self,
        phase: Phase,
        stepping: Stepping | None,
        change: PhaseChange | None = None,
        within: Mapping[str, Any] | None = None,
    ) -> PhaseChange | None:
        """One pass over the training data, or what the phase has left of it; then validation and a checkpoint.

        Args:
            phase: The active phase.
            stepping: What steps its parameters.
            change: The end of the phase, if a step brought it before the run was broken off.
            within: Where in the pass that was, if it was inside one.
        """
        if self.features.keeps:
            # Before anything kept is read; the whole audit was at the end of the last epoch.
            self.audit.verify(bytes_only=True, counted=within is None)
        self.consensus.tell()
        if stepping is None:
            log, is_whole = None, True
        else:
            log, change, is_whole = self.train_epoch(phase, stepping, change, within)
        # Before anything is read off the model or kept of it, the frozen bytes are proven.
        self.audit.verify()
        parts = self.parts
        self.consensus.prove(parts.root, phase.freeze.plan)
        with self.keeper.averaged():
            scores, metrics = self.validate(phase)
        metrics["train/loss"] = log.mean_loss if log else math.nan
        # A phase may end with the last step of a pass; the pass is complete all the same.
        if is_whole and stepping is not None:
            phase.balance.after_epoch()
            stepping.lr_schedule.epoch_done(metrics)
        if is_whole and change is None:
            change = self.scheduler.epoch_done(metrics)
        if change is None:
            change = self.scheduler.time_passed(self.consensus.tell())
        if change is not None:
            self.outcome.scores[phase.name] = scores
        self.keep(phase, stepping, metrics, log, change)
        self.saver.end_if_asked(self.step)
        return change

    def train_epoch(
        self,
        phase: Phase,
        stepping: Stepping,
        change: PhaseChange | None = None,
        within: Mapping[str, Any] | None = None,
    ) -> tuple[StepLog, PhaseChange | None, bool]:
        """Steps through the training data.

        Returns:
            The steps' log, the end of the phase if a step brought it, and whether the data was gone through to its end.
        """
        parts = self.parts
        self.epoch += within is None
        num_windows = 0 if within is None else int(within["windows"])
        every = self.config.tracking.log_every_steps
        log = StepLog(self.tracker, phase.tasks, every, phase.name, self.epoch, self.scaler.is_enabled())
        if within is not None:
            log.load_state_dict(within["log"])
        stepper = Stepper(
            *(parts, self.objective, self.consensus, self.keeper, self.audit, self.gradients, self.scaler, self.world),
            *(phase, stepping, log),
        )
        num_in_all = num_batches(len(parts.train), phase.batch_size)
        total, title = num_in_all * min(phase.batch_size, len(parts.train)), f"{phase.name} epoch {self.epoch}"
        batches = self.batches(phase, skip=min(num_windows * phase.optim.accumulate, num_in_all))
        with closing(batches), progress_bar(total, title, self.quiet) as bar:
            for window in windows(batches, phase.optim.accumulate) if change is None else ():
                if wrong := stepper.take(window, self.step):
                    if self.config.not_finite == "stop":
                        self.stop_before(wrong, phase, stepping, log, num_windows)
                    stepper.leave_out(wrong)
                stepper.finish()
                self.step += 1
                num_windows += 1
                bar.update(sum(len(batch.everyone) for batch in window))
                bar.set_postfix_str(log.latest, refresh=False)
                change = self.scheduler.step_done() or self.scheduler.time_passed(self.consensus.tell())
                if change is not None:
                    break
                if self.saver.is_time(self.step, is_last=num_windows == phase.steps_per_epoch):
                    self.keep_within(phase, stepping, log, num_windows)
                    self.saver.end_if_asked(self.step)
        log.flush()
        return log, change, num_windows == phase.steps_per_epoch

    def batches(self, phase: Phase, skip: int) -> Generator[Batch]:
        """The batches of the epoch, without the first ones; images whose features are kept are not read."""
        parts, view = self.parts, self.features.view(self.epoch - 1)
        loading = Loading(not self.features.keeps, parts.device, self.config.data.num_workers)
        return training_batches(
            *(parts.train, phase.batch_size, self.config.seed, self.epoch - 1, view, self.world),
            skip=skip,
            loading=loading,
        )

    def stop_before(
        self, wrong: NotFiniteError, phase: Phase, stepping: Stepping, log: StepLog, num_windows: int
    ) -> Never:
        """Saves the state before a step that could not be taken, and ends the run."""
        self.write_json("not_finite.json", wrong.to_json(self.epoch))
        folder = self.keep_within(phase, stepping, log, num_windows)
        raise Stopped(
            f"stopped: {wrong.fact}, for images that not_finite.json lists; saved as it was before that step:"
            f" {folder}; not_finite=skip leaves such steps out"
        )

    def keep(
        self,
        phase: Phase,
        stepping: Stepping | None,
        metrics: dict[str, float],
        log: StepLog | None,
        change: PhaseChange | None,
    ) -> None:
        """Logs a validation, and keeps the weights that it judged."""
        row: dict[str, Any] = {"step": self.step, "epoch": self.epoch, "phase": phase.name}
        row |= {name: value for name, value in metrics.items() if name.startswith("val/")}
        row["audit/violations"] = len(self.audit.report.violations)
        if log is not None:
            row["perf/images_per_s"] = log.images_per_s
            self.num_skipped += log.num_skipped
        if self.scaler.is_enabled() or self.config.not_finite == "skip":
            row["train/skipped_steps"] = self.num_skipped
        self.tracker.log(row)
        # An evaluation has no weights of its own, unless it comes first.
        if stepping is not None or self.step == 0:
            links = self.keeper.judge(metrics, self.step)
            self.saver.save(self.place, phase, stepping, row, links, change)
            self.note_best()
        tell_epoch(self.parts, row, log)

    def keep_within(self, phase: Phase, stepping: Stepping, log: StepLog, num_windows: int) -> Path:
        """Keeps the state inside an epoch."""
        log.flush()
        self.audit.verify(counted=False)
        root, plan = self.parts.root, phase.freeze.plan
        statistics = self.consensus.statistics(root, plan)
        self.consensus.prove(root, plan)
        within = Within(num_windows, phase.batch_size, phase.optim.accumulate, log.state_dict())
        row = {"step": self.step, "epoch": self.epoch, "phase": phase.name}
        folder = self.saver.save(self.place, phase, stepping, row, within=within, statistics=statistics)
        # Whenever it is saved, training goes on as it would have.
        put_back(root, statistics)
        return folder

    @property
    def place(self) -> Place:
        return Place(self.index, self.step, self.epoch, self.num_skipped)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes a file of the run directory, in the first process."""
        if self.world.leads:
            write_json(self.outcome.run_dir / name, content)

    def note_best(self) -> None:
        self.outcome.best_score, self.outcome.best_step = self.keeper.best.score, self.keeper.best.step


def windows(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """Groups batches whose gradients make one step; the last group of an epoch may be smaller."""
    while window := list(islice(batches, size)):
        yield window
