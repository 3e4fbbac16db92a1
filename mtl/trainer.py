"""The training loop: through the phases, and in each one batch -> losses -> backward -> audit -> step -> log."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

from mtl.assembly import Parts, Phase, make_run_dir, plan_summary
from mtl.audit import GradientAudit, Report
from mtl.checkpoint import Checkpoints, write_json, write_text
from mtl.console import logger, progress_bar
from mtl.data import Batch, num_batches, training_batches
from mtl.freeze import enforce, is_frozen
from mtl.optim import build_lr_schedule, build_optimizer
from mtl.scheduler import PhaseChange, TaskScheduler
from mtl.steplog import StepLog
from mtl.tracking import Tracker
from mtl.validation import Scores, score, validate
from mtl.yaml_source import dump_yaml


@dataclass
class Outcome:
    """What a run came to.

    Attributes:
        run_dir: Where its files lie.
        trivial: The trivial predictor's metrics.
        scores: Metrics at the end of each phase, by the phase's name.
        report: The audit.
        best_score: The best `val/score`.
        best_step: The step after which it was reached.
        train_s: Seconds of training and validation, without set-up.
    """

    run_dir: Path
    trivial: Scores
    scores: dict[str, Scores] = field(default_factory=dict)
    report: Report = field(default_factory=Report)
    best_score: float = float("-inf")
    best_step: int = 0
    train_s: float = 0.0


def train(parts: Parts, quiet: bool = False) -> Outcome:
    """Trains through all phases and writes the run directory.

    Raises:
        ConfigError: The run directory cannot be made.
        AuditError: The freeze was broken, and the audit's policy is to raise; `audit.json` says how.
        FloatingPointError: A loss is not finite.
    """
    run_dir = make_run_dir(parts.config)
    resolved = parts.config.model_dump(mode="json", exclude_none=True)
    write_text(run_dir / "config.yaml", dump_yaml(resolved))
    write_json(run_dir / "plan.json", plan_summary(parts.phases, parts.root))
    tracker = Tracker(parts.config.tracking, run_dir, parts.config.name, resolved)
    logger.info(tracker.message)
    _announce_classic(parts)
    trainer = Trainer(parts, run_dir, tracker, quiet)
    try:
        return trainer.run()
    finally:
        report = trainer.audit.report
        write_json(run_dir / "audit.json", report.to_json())
        tracker.finish(
            {"audit/ok": report.ok, "val/best_score": trainer.outcome.best_score}, failed=not trainer.finished
        )


def _announce_classic(parts: Parts) -> None:
    """Says what the classic list of substrings freezes, in the words in which it has always been said."""
    substrings = parts.config.MODEL.NOT_TRAIN_IN_MULTI_TASK
    if not substrings:
        return
    logger.info(f"use freeze for {substrings}")
    for name in parts.phases[0].plan.names.frozen:
        if any(substring in name for substring in substrings):
            logger.info(f"freezing {name}")


class Trainer:
    """One run. `run` is the way in; everything else is called from there."""

    def __init__(self, parts: Parts, run_dir: Path, tracker: Tracker, quiet: bool) -> None:
        self.parts = parts
        self.config = parts.config
        self.tracker = tracker
        self.quiet = quiet
        self.scheduler = TaskScheduler(parts.config.phases)
        self.audit = GradientAudit(parts.root, policy=parts.config.audit.policy)
        self.checkpoints = Checkpoints(run_dir / "checkpoints")
        self.autocast = torch.autocast(
            parts.device.type, torch.bfloat16, enabled=parts.config.precision == "bf16", cache_enabled=True
        )
        self.step = 0
        self.epoch = 0
        self.finished = False
        self.outcome = Outcome(run_dir, parts.trivial, report=self.audit.report)

    @property
    def batch_size(self) -> int:
        return self.config.data.batch_size

    def run(self) -> Outcome:
        started = time.perf_counter()
        optimizer: Optimizer | None = None
        while self.scheduler.index is not None:
            optimizer = self.run_phase(self.parts.phases[self.scheduler.index], optimizer)
        self.outcome.train_s = time.perf_counter() - started
        self.finished = True
        return self.outcome

    def run_phase(self, phase: Phase, previous: Optimizer | None) -> Optimizer:
        """Enters a phase and trains until the scheduler ends it. The order of the entry matters: see each comment."""
        parts = self.parts
        # Accumulation never crosses into a phase: windows end with the epoch or the phase, whichever comes first.
        # No gradient of the phase before, requires_grad by plan, and frozen modules in eval mode for good.
        enforce(parts.root, phase.plan)
        # Only what trains is in the optimizer: neither decay nor momentum can reach the rest.
        optimizer = build_optimizer(phase.groups, previous)
        lr_schedule = build_lr_schedule(self.config.optim, optimizer, parts.num_steps(phase))
        # The audit is told the patterns, not the plan: it draws the line itself, and fingerprints what is behind it.
        with self.audit.phase(phase.config.name, freeze=phase.freeze, optimizers=[optimizer, parts.balance]) as record:
            # From here on the file says that this phase began, and that nothing is proven of it yet.
            write_json(self.outcome.run_dir / "audit.json", self.audit.report.to_json())
            # What is frozen whole need not be recorded for a backward that never comes.
            parts.model.trunk_is_frozen = is_frozen(phase.plan, "trunk")
            change = None
            while change is None:
                change = self.run_epoch(phase, optimizer, lr_schedule)
        write_json(self.outcome.run_dir / "audit.json", self.audit.report.to_json())
        if record.num_trained == 0:
            logger.warning(f"{change.ended}: not one of its {record.num_trainable} trainable parameters changed")
        logger.info(f"{change.ended}: {change.reason}" + (f"; next phase: {change.entered}" if change.entered else ""))
        return optimizer

    def run_epoch(
        self, phase: Phase, optimizer: Optimizer, lr_schedule: torch.optim.lr_scheduler.LambdaLR
    ) -> PhaseChange | None:
        """One pass over the training data, or what the phase has left of it; then validation and a checkpoint."""
        parts, tasks = self.parts, self.parts.tasks
        batches = training_batches(parts.train, self.batch_size, self.config.seed, self.epoch)
        total = num_batches(parts.train, self.batch_size) * min(self.batch_size, len(parts.train))
        self.epoch += 1
        log = StepLog(self.tracker, list(tasks), self.config.tracking.log_every_steps, phase.config.name, self.epoch)
        change, num_windows = None, 0
        with progress_bar(total, f"{phase.config.name} epoch {self.epoch}", self.quiet) as bar:
            for window in windows(batches, self.config.optim.accumulate):
                window_losses = []
                for batch in window:
                    batch = batch.to(parts.device)
                    losses = self.losses(batch)
                    total_loss = parts.balance(losses)
                    (total_loss / len(window)).backward()
                    window_losses.append(torch.cat([total_loss.detach()[None], losses.detach()]))
                self.audit.after_backward()
                lr = lr_schedule.get_last_lr()
                optimizer.step()
                lr_schedule.step()
                self.audit.after_step()
                optimizer.zero_grad(set_to_none=True)
                parts.balance.after_step(lambda batch=batch: self.losses(batch))  # type: ignore[misc]
                self.step += 1
                num_windows += 1
                num_images = sum(map(len, window))
                log.add(self.step, window_losses, max(map(float, lr)), num_images)
                bar.update(num_images)
                bar.set_postfix_str(log.latest, refresh=False)
                change = self.scheduler.step_done()
                if change is not None:
                    break
        # A phase may end with the last step of a pass; the pass is complete all the same.
        if num_windows == parts.steps_per_epoch:
            parts.balance.after_epoch()
            change = change or self.scheduler.epoch_done()
        log.flush()
        self.finish_epoch(phase, log, change)
        return change

    def losses(self, batch: Batch) -> Tensor:
        """The losses of all tasks on a batch, "t", float32."""
        with self.autocast:
            outputs = self.parts.model(batch.images)
        return torch.stack([task.loss(outputs[name], batch.labels[name]) for name, task in self.parts.tasks.items()])

    def finish_epoch(self, phase: Phase, log: StepLog, change: PhaseChange | None) -> None:
        # Before anything is read off the model or kept of it, the frozen bytes are proven.
        self.audit.verify()
        parts, outcome = self.parts, self.outcome
        scores = validate(parts.model, parts.tasks, parts.val, self.batch_size, parts.device, self.autocast)
        mean_skill = score(parts.tasks, scores, outcome.trivial)
        names = ["last"]
        # Whatever the first score is, even NaN, some weights are kept as the best so far.
        if outcome.best_step == 0 or mean_skill > outcome.best_score or math.isnan(outcome.best_score):
            outcome.best_score, outcome.best_step = mean_skill, self.step
            names.append("best")
        if change is not None:
            outcome.scores[phase.config.name] = scores
        metrics = {f"val/{task}/{name}": value for task, values in scores.items() for name, value in values.items()}
        row: dict[str, float | str] = {
            "step": self.step,
            "epoch": self.epoch,
            "phase": phase.config.name,
            "val/score": mean_skill,
            **metrics,
            "audit/violations": len(self.audit.report.violations),
            "perf/images_per_s": log.images_per_s,
        }
        self.tracker.log(row)
        self.checkpoints.save(parts.root, {**row, "scheduler": self.scheduler.state_dict()}, names)
        goals = "  ".join(
            f"{name} {task.goal.metric} {scores[name][task.goal.metric]:.3f}" for name, task in parts.tasks.items()
        )
        logger.info(
            f"{phase.config.name}  epoch {self.epoch}  step {self.step}  loss {log.mean_loss:.3f}"
            f"  val/score {mean_skill:.3f}  {goals}  {log.images_per_s:.0f} img/s"
        )


def windows(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """Groups batches whose gradients make one step; the last group of an epoch may be smaller."""
    while window := list(islice(batches, size)):
        yield window
