"""The training loop: through the phases, and in each one batch -> losses -> backward -> audit -> step -> log."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from mtl.announce import announce_classic, tell_epoch, tell_idle_tasks, tell_unreached
from mtl.assembly import Parts
from mtl.audit import GradientAudit, HoldsParameters, PhaseRecord
from mtl.checkpoint import CheckpointError, write_json, write_text
from mtl.config.source import dump_yaml
from mtl.console import logger, progress_bar
from mtl.data import Batch, num_batches, training_batches
from mtl.features import FeatureSource
from mtl.freeze import enforce, is_frozen, is_still
from mtl.gradientlog import GradientLog
from mtl.keeper import Keeper, Resumption, Stepping, resume_from
from mtl.lr_schedule import LrScheduleState
from mtl.optim import held_by
from mtl.outcome import Outcome
from mtl.patterns import text_of
from mtl.phases import Phase
from mtl.phases.length import SCORE
from mtl.run_dir import make_run_dir
from mtl.scheduler import PhaseChange, TaskScheduler
from mtl.steplog import StepLog
from mtl.tracking import Tracker
from mtl.trial import autocast_for
from mtl.validation import Scores, score, validate

# Between steps, the audit looks so often at a trunk that is not run: a step takes less than a look at all of it.
_EVERY_RESTING = 20


def train(parts: Parts, quiet: bool = False) -> Outcome:
    """Trains through all phases and writes the run directory.

    Raises:
        ConfigError: The run directory cannot be made, or there is nothing to resume from.
        AuditError: The freeze was broken, and the audit's policy is to raise; `audit.json` says how.
        FloatingPointError: A loss is not finite.
    """
    resumption = None
    if parts.config.resume is not None:
        try:
            resumption = resume_from(Path(parts.config.resume), parts)
        except CheckpointError as error:
            raise parts.config.mistake(("resume",), str(error)) from error
    run_dir = make_run_dir(parts.config)
    resolved = parts.config.model_dump(mode="json", exclude_none=True)
    write_text(run_dir / "config.yaml", dump_yaml(resolved))
    write_json(run_dir / "plan.json", parts.plan.to_json())
    tracker = Tracker(parts.config.tracking, run_dir, parts.config.name, resolved)
    logger.info(tracker.message)
    announce_classic(parts)
    trainer = Trainer(parts, run_dir, tracker, quiet)
    try:
        if resumption is not None:
            trainer.take_up(resumption)
        return trainer.run()
    finally:
        report = trainer.audit.report
        write_json(run_dir / "audit.json", report.to_json())
        tracker.finish(
            {"audit/ok": report.ok, "val/best_score": trainer.outcome.best_score}, failed=not trainer.finished
        )


class Trainer:
    """One run. `run` is the way in; everything else is called from there."""

    def __init__(self, parts: Parts, run_dir: Path, tracker: Tracker, quiet: bool) -> None:
        self.parts = parts
        self.config = parts.config
        self.tracker = tracker
        self.quiet = quiet
        self.scheduler = TaskScheduler([phase.length for phase in parts.phases])
        self.audit = GradientAudit(parts.root, policy=parts.config.audit.policy)
        self.gradients = GradientLog(tracker, parts.model.trunk, parts.config.audit.gradients_every_steps)
        self.keeper = Keeper(parts, run_dir / "checkpoints")
        self.autocast = autocast_for(parts.config.precision, parts.device)
        # Small gradients of fp16 would be zero: losses are multiplied, and what overflows is not stepped.
        self.scaler = GradScaler(parts.device.type, enabled=parts.config.precision == "fp16")
        self.features = FeatureSource(parts, self.autocast, quiet)
        # What tasks of which nothing trains scored at their one validation in the phase.
        self.still_scores: Scores = {}
        self.step = 0
        self.epoch = 0
        # Where the rate's course stood in a phase that is taken up in its middle.
        self.resumed: LrScheduleState | None = None
        self.clock = time.perf_counter()
        self.finished = False
        self.outcome = Outcome(run_dir, parts.trivial, report=self.audit.report)

    def take_up(self, resumption: Resumption) -> None:
        """Stands where another run stood; its weights are in the model already."""
        self.step, self.epoch, self.resumed = resumption.step, resumption.epoch, resumption.lr_schedule
        self.scheduler.load_state_dict(resumption.scheduler)
        self.keeper.take_up(resumption)
        self.note_best()
        phase = self.parts.phases[self.scheduler.index or 0].name
        logger.info(f"resume: phase {phase!r} from step {self.step}, {resumption.folder}")

    def run(self) -> Outcome:
        started = time.perf_counter()
        while self.scheduler.index is not None:
            self.run_phase(self.scheduler.index)
        self.outcome.train_s = time.perf_counter() - started
        self.finished = True
        return self.outcome

    def run_phase(self, index: int) -> None:
        """Enters a phase and trains until the scheduler ends it. The order of the entry matters: see each comment."""
        parts, phase = self.parts, self.parts.phases[index]
        resumed, self.resumed = self.resumed, None
        self.clock = time.perf_counter()
        if phase.restore is not None and resumed is None:
            self.keeper.rewind(phase, *phase.restore)
        # Accumulation never crosses into a phase: windows end with the epoch or the phase, whichever comes first.
        # No gradient of the phase before, requires_grad by plan, and frozen modules in eval mode for good.
        enforce(parts.root, phase.freeze.plan)
        tell_idle_tasks(parts, phase)
        if phase.freeze.unreached:
            tell_unreached(parts, phase)
        # Only what trains is in the optimizer: neither decay nor momentum can reach the rest.
        stepping = None if phase.config.evaluate_only else self.keeper.build_stepping(index, resumed)
        optimizers: list[HoldsParameters] = [] if stepping is None else [stepping.optimizer, phase.balance]
        # The audit is told the patterns, not the plan: it draws the line itself, and fingerprints what is behind it.
        # How many names they must match was the plan's affair: the audit counts plain tensor attributes as well.
        patterns = [text_of(pattern) for pattern in phase.freeze.patterns]
        # What no active task reaches is frozen, unless the user lets it be: then it is not asked to train.
        idle = () if self.config.unreached == "freeze" else phase.freeze.unreached
        with self.audit.phase(phase.name, freeze=patterns, optimizers=optimizers, idle=idle) as record:
            # From here on the file says that this phase began, and that nothing is proven of it yet.
            write_json(self.outcome.run_dir / "audit.json", self.audit.report.to_json())
            # What is frozen whole need not be recorded for a backward that never comes.
            parts.model.trunk_is_frozen = is_frozen(phase.freeze.plan, "trunk")
            if self.config.compile:
                parts.model.compile_anew()
            # What is frozen from the first layer on is computed once for each image, while the audit stands for it.
            done = self.scheduler.state_dict()["steps"]
            self.keep_features(index, record, done)
            self.still_scores = {}
            self.gradients.enter(phase.name, phase.tasks, self.step + 1 - done)
            change = None
            while change is None:
                change = self.run_epoch(phase, stepping)
            phase.balance.after_phase()
            self.features.leave()
        write_json(self.outcome.run_dir / "audit.json", self.audit.report.to_json())
        logger.info(f"{change.ended}: {change.reason}" + (f"; next phase: {change.entered}" if change.entered else ""))

    def keep_features(self, index: int, record: PhaseRecord, steps_done: int) -> None:
        """Decides what a phase, whose audit has begun, need not compute again."""
        self.features.enter(index, record, lambda: self.audit.holds, steps_done)
        self.audit.look_every(_EVERY_RESTING if self.features.trunk_rests else 1)

    def run_epoch(self, phase: Phase, stepping: Stepping | None) -> PhaseChange | None:
        """One pass over the training data, or what the phase has left of it; then validation and a checkpoint."""
        if self.features.keeps:
            # Before anything kept is read; the whole audit was at the end of the last epoch.
            self.audit.verify(bytes_only=True)
        if stepping is None:
            log, change, is_whole = None, None, True
        else:
            log, change, is_whole = self.train_epoch(phase, stepping)
        # Before anything is read off the model or kept of it, the frozen bytes are proven.
        self.audit.verify()
        parts = self.parts
        with self.keeper.averaged():
            scores = self.validate(phase)
        metrics = {f"val/{task}/{name}": value for task, values in scores.items() for name, value in values.items()}
        metrics |= {SCORE: score(parts.tasks, scores, parts.trivial), "train/loss": log.mean_loss if log else math.nan}
        # A phase may end with the last step of a pass; the pass is complete all the same.
        if is_whole and stepping is not None:
            phase.balance.after_epoch()
            stepping.lr_schedule.epoch_done(metrics)
        if is_whole and change is None:
            change = self.scheduler.epoch_done(metrics)
        if change is None:
            change = self.scheduler.time_passed(self.seconds_since())
        if change is not None:
            self.outcome.scores[phase.name] = scores
        self.keep(phase, stepping, metrics, log)
        return change

    def train_epoch(self, phase: Phase, stepping: Stepping) -> tuple[StepLog, PhaseChange | None, bool]:
        """Steps through the training data.

        Returns:
            The steps' log, the end of the phase if a step brought it, and whether the data was gone through to its end.
        """
        parts, optimizer, lr_schedule = self.parts, stepping.optimizer, stepping.lr_schedule
        view = self.features.view(self.epoch)
        batches = training_batches(parts.train, phase.batch_size, self.config.seed, self.epoch, view)
        total = num_batches(len(parts.train), phase.batch_size) * min(phase.batch_size, len(parts.train))
        trainable = held_by(optimizer)
        self.epoch += 1
        log = StepLog(self.tracker, phase.tasks, self.config.tracking.log_every_steps, phase.name, self.epoch)
        change, num_windows = None, 0
        with progress_bar(total, f"{phase.name} epoch {self.epoch}", self.quiet) as bar:
            for window in windows(batches, phase.optim.accumulate):
                window_losses = []
                for batch in window:
                    batch = batch.to(parts.device)
                    each = self.each_loss(batch, phase.tasks)
                    self.gradients.before_backward(each, self.step + 1, log)
                    losses = torch.stack(each)
                    total_loss = phase.balance(losses)
                    self.scaler.scale(total_loss / len(window)).backward()
                    window_losses.append(torch.cat([total_loss.detach()[None], losses.detach()]))
                self.scaler.unscale_(optimizer)
                self.audit.after_backward()
                if phase.optim.clip_norm is not None:
                    nn.utils.clip_grad_norm_(trainable, phase.optim.clip_norm)
                lr = lr_schedule.highest
                self.scaler.step(optimizer)
                self.scaler.update()
                lr_schedule.step()
                if self.keeper.ema is not None:
                    self.keeper.ema.update()
                self.audit.after_step()
                optimizer.zero_grad(set_to_none=True)
                phase.balance.after_step(lambda batch=batch: self.losses(batch, phase.tasks))  # type: ignore[misc]
                self.step += 1
                num_windows += 1
                num_images = sum(map(len, window))
                log.add(self.step, window_losses, lr, num_images)
                bar.update(num_images)
                bar.set_postfix_str(log.latest, refresh=False)
                change = self.scheduler.step_done() or self.scheduler.time_passed(self.seconds_since())
                if change is not None:
                    break
        log.flush()
        return log, change, num_windows == phase.steps_per_epoch

    def validate(self, phase: Phase) -> Scores:
        """Metrics of all tasks; those of which nothing trains are measured once in a phase."""
        if not self.audit.holds:
            self.still_scores.clear()
        parts, still = self.parts, self.still_scores
        tasks = {name: task for name, task in parts.tasks.items() if name not in still}
        fresh = validate(parts.model, tasks, parts.val, phase.batch_size, parts.device, self.autocast, self.features)
        plan = phase.freeze.plan
        if is_still(plan, "trunk"):
            still |= {name: each for name, each in fresh.items() if is_still(plan, f"heads.{name}")}
        return {name: (fresh | still)[name] for name in parts.tasks}

    def losses(self, batch: Batch, tasks: Sequence[str]) -> Tensor:
        """The losses of some tasks on a batch, "t", float32."""
        return torch.stack(self.each_loss(batch, tasks))

    def each_loss(self, batch: Batch, tasks: Sequence[str]) -> list[Tensor]:
        """The same losses apart, scalars, whose graphs part at the heads."""
        with self.autocast:
            outputs = self.parts.model.decode(self.features(batch, tasks), batch.size, tasks)
        return [self.parts.tasks[name].loss(outputs[name], batch.labels[name]) for name in tasks]

    def seconds_since(self) -> float:
        """Time since the last call, or since the phase began."""
        before, self.clock = self.clock, time.perf_counter()
        return self.clock - before

    def keep(self, phase: Phase, stepping: Stepping | None, metrics: dict[str, float], log: StepLog | None) -> None:
        """Logs a validation, and keeps the weights that it judged."""
        row: dict[str, Any] = {"step": self.step, "epoch": self.epoch, "phase": phase.name}
        row |= {name: value for name, value in metrics.items() if name.startswith("val/")}
        row["audit/violations"] = len(self.audit.report.violations)
        if log is not None:
            row["perf/images_per_s"] = log.images_per_s
        self.tracker.log(row)
        # An evaluation has no weights of its own, unless it comes first.
        if stepping is not None or self.step == 0:
            frozen = phase.freeze.plan.names.frozen
            self.keeper.save(row, metrics, self.scheduler.state_dict(), frozen, stepping)
            self.note_best()
        tell_epoch(self.parts, row, log)

    def note_best(self) -> None:
        self.outcome.best_score, self.outcome.best_step = self.keeper.best.score, self.keeper.best.step


def windows(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """Groups batches whose gradients make one step; the last group of an epoch may be smaller."""
    while window := list(islice(batches, size)):
        yield window
