"""The training loop: phases, epochs, steps. The forward of a step is `mtl.training.step`'s."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from itertools import chain, islice
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.amp import GradScaler

from mtl.audit import GradientAudit, HoldsParameters, PhaseRecord
from mtl.data import Batch, Loading, training_batches, windows
from mtl.distributed.world import ALONE, World
from mtl.patterns import text_of
from mtl.phases.enter import entered
from mtl.phases.metrics import BEST_SCORE
from mtl.phases.resolve import Phase
from mtl.runtime.console import logger
from mtl.runtime.rng import rng_unchanged
from mtl.runtime.signals import Interrupt, Stopped
from mtl.training.autotune import autocast_for
from mtl.training.checkpoints import CheckpointWriter
from mtl.training.features import FeatureSource
from mtl.training.head_steps import HeadSteps
from mtl.training.history import UNKNOWN, History
from mtl.training.nonfinite import StepGuard, gradient_norm, is_finite
from mtl.training.phase import ActivePhase, PhaseOptimizer
from mtl.training.result import RunResult
from mtl.training.resume import Resumption
from mtl.training.setup import RunSetup
from mtl.training.state import RunState
from mtl.training.step import StepLosses
from mtl.training.step_sync import StepSync, StepTasks
from mtl.training.tracking.log import RunLog
from mtl.training.tracking.steps import LossRow
from mtl.training.tracking.tracker import Tracker
from mtl.training.validator import Validator

# Between steps, the audit looks so often at a trunk that is not run: a step takes less than a look at all of it.
_EVERY_RESTING = 20


class Trainer:
    """Trains through the phases. Everything that survives a restart is in `state`, which is restored before `run`."""

    def __init__(
        self,
        setup: RunSetup,
        run_dir: Path,
        tracker: Tracker,
        quiet: bool,
        asked: Interrupt | None = None,
        world: World = ALONE,
        history: History = UNKNOWN,
    ) -> None:
        config, quiet = setup.config, quiet or not world.is_main
        autocast = autocast_for(config.precision, setup.device)
        self.setup = setup
        self.audit = GradientAudit(setup.root, policy=config.audit.policy, whole=True, strict=True)
        # Small gradients of fp16 would be zero: losses are multiplied, and what overflows is not stepped.
        self.scaler = GradScaler(setup.device.type, enabled=config.precision == "fp16")
        self.features = FeatureSource(setup, autocast, quiet, world)
        self.sync = StepSync(world, self.audit, asked or Interrupt(), config.distributed.sync_batchnorm)
        self.state = RunState(setup, self.audit, self.scaler, self.features, tracker, world, history)
        self.losses = StepLosses(setup, self.features, autocast, self.scaler, world)
        self.validate = Validator(setup, autocast, self.features, self.sync, world)
        self.checkpoints = CheckpointWriter(setup, run_dir / "checkpoints", world)
        self.log = RunLog(setup, run_dir, tracker, quiet, world)

    def restore(self, resumption: Resumption) -> None:
        """Restores the run as it was when it wrote a checkpoint; the checkpoint's weights are in the model already."""
        self.state.restore(resumption)
        self.checkpoints.relink(resumption, self.state)
        self.log.dashboard.resume(self.audit.report)
        phase = self.setup.phases[self.state.phase_index].name
        logger.info(f"resume: phase {phase!r} from step {self.state.step}, {resumption.folder}")

    def run(self) -> RunResult:
        self.state.start_clock()
        self.log.results(self.state.results())
        with self.checkpoints.written():
            while (phase := self.state.phase) is not None:
                self.run_phase(phase)
        return self.result()

    def run_phase(self, phase: Phase) -> None:
        with self.active(phase) as active:
            while not self.state.phase_is_over:  # True at once if the run was killed after the phase's last epoch
                self.train_epoch(active)
                self.finish_epoch(active)
        assert self.state.change is not None
        self.log.phase_ended(self.state.change, self.audit.report)  # only reached if the audit has proven it
        self.state.end_phase()
        self.log.results(self.state.results())

    @contextmanager
    def active(self, phase: Phase) -> Iterator[ActivePhase]:
        """The only way into a phase: fresh, resumed, or timed by `mtl bench`. The order matters; nothing is drawn."""
        state, setup = self.state, self.setup
        self.sync.begin_phase()
        with rng_unchanged(setup.device):
            if not state.in_phase:  # once a phase, never on resume
                self.checkpoints.load_best(state, phase)
                state.begin_phase(phase)
                self.log.dashboard.begin_phase(phase, state.step)
            self.log.phase_begins(phase)
        with entered(setup.root, phase.freeze.plan):
            with rng_unchanged(setup.device):
                # Only trainable parameters are in the optimizer: neither decay nor momentum can reach the others.
                optim = None if phase.config.evaluate_only else PhaseOptimizer(setup, phase, state, self.sync.world)
            guard = None if setup.config.not_finite == "raise" else StepGuard(setup.root, phase.balance)
            active = ActivePhase(phase, {name: setup.tasks[name] for name in phase.tasks}, optim, guard)
            with self._audited(active) as record, setup.workers.stay():
                self._begin(active, record)
                yield active
                phase.balance.after_phase()
                if optim is not None:
                    optim.close(state)
                self.features.leave()

    def _begin(self, active: ActivePhase, record: PhaseRecord) -> None:
        """What a phase does before its first step, once the audit stands for its freeze."""
        setup, phase, state = self.setup, active.phase, self.state
        self.log.audit(self.audit.report)  # the file says: begun, nothing proven yet
        with rng_unchanged(setup.device):
            if setup.config.compile:
                setup.model.recompile()
            if not state.phase_is_over:
                # What is frozen from the first layer on is computed once per image, while the audit stands for it.
                self.features.enter(state.phase_index, record, lambda: self.sync.holds, state.steps_in_phase)
                self.audit.look_every(_EVERY_RESTING if self.features.trunk_rests else 1)
                self.log.analyse_from(phase, state.step + 1 - state.steps_in_phase)
        self.validate.begin_phase()

    def train_epoch(self, active: ActivePhase) -> None:
        """One pass over the training data, or what the phase or a resumed run has left of it; none if it evaluates."""
        state, phase = self.state, active.phase
        if self.features.keeps:
            # Before anything kept is read. Where nothing was trained since every byte was compared, signs are enough.
            if self.audit.proven:
                self.audit.check_signs()
            else:
                self.audit.verify(bytes_only=True, counted=state.steps_in_epoch is None)
        self.sync.exchange()
        if active.optim is None:
            return
        state.begin_epoch()
        several = HeadSteps(state, self.audit, self.features, self.losses, self.checkpoints)
        active.log = self.log.steps_of(phase, state.epoch, state.epoch_sums, self.scaler.is_enabled())
        with closing(self._batches(phase)) as batches, self.log.progress_bar(phase, state.epoch) as bar:
            groups, pending = windows(batches, phase.optim.accumulate), deque[Batch]()
            while True:
                if not pending and (number := several.num_possible(phase)):
                    # Steps of heads on kept features: to the bit those of `train_step`, at a fraction of its time.
                    pending.extend(islice(batches, number))
                    if pending and not any(batch.lacking for batch in pending):
                        several(active, active.optim, pending)
                        state.step_done(0.0, len(pending))
                        bar.update(sum(map(len, pending)))
                        pending.clear()
                window = [pending.popleft()] if pending else next(groups, None)
                if window is None:
                    break
                self.train_step(active, active.optim, window)
                state.step_done(self.sync.exchange())
                bar.update(sum(len(batch.everyone) for batch in window))
                bar.set_postfix_str(active.log.latest, refresh=False)
                if state.phase_is_over:
                    break
                if self._is_save_due(phase):
                    self.save_within_epoch(active)
                    self.sync.exit_if_asked(state.step)
        active.log.flush()
        state.end_epoch(active.log.num_skipped, phase.steps_per_epoch)

    def train_step(self, active: ActivePhase, optim: PhaseOptimizer, window: Sequence[Batch]) -> None:
        """Losses -> backward -> audit -> step -> log. The gradients of a window's batches make one step."""
        phase, step, rows = active.phase, self.state.step + 1, list[LossRow]()
        if active.guard is not None:
            active.guard.before()
        tasks = self.sync.tasks(window, phase.tasks)
        silent = optim.silent(tasks, self.sync.world)
        shares = self.sync.shares(window, {name: active.tasks[name] for name in tasks.names})
        for batch, share in zip(window, shares, strict=True):
            # Gradients are averaged over the processes with those of the window's last batch.
            is_last = batch is window[-1]
            with nullcontext() if is_last else optim.replica.no_sync():
                total, losses, each = optim.replica(self.losses, batch, phase, tasks, share, step - 1, silent, is_last)
                self.log.task_gradients(dict(zip(tasks.names, each, strict=True)), step, active.log)
                rows.append((total.detach(), losses.detach()))
                # The loss of a method that looks at gradients goes back through no graph, and frees none.
                del losses, each
                # Not even divided by 1: a kernel more in each direction takes as long as a small layer.
                mean = total / len(window) if len(window) > 1 else total
                self.scaler.scale(mean).backward()  # type: ignore[no-untyped-call]
        self.scaler.unscale_(optim.optimizer)
        optim.leave_out(tasks)
        norm = gradient_norm(optim.trainable, phase.optim.clip_norm)
        # Gradients of fp16 are the scaler's affair.
        if active.guard is not None and not is_finite([*chain(*rows), *([] if self.scaler.is_enabled() else [norm])]):
            has_moved = self._leave_out(active, active.guard, tasks, rows, norm, window)
        else:
            self.audit.after_backward()  # no frozen tensor has a gradient
            lr = optim.rates
            with optim.others_unmoved(phase.balance, tasks):
                self.scaler.step(optim.optimizer)
            self.scaler.update()
            has_moved = self._has_moved(phase, norm)
            if self.state.ema is not None and has_moved:
                self.state.ema.update()
            active.log.add(step, tasks.names, rows, norm, lr, [each.everyone for each in window])
        # Taken or left out: schedule, audit and gradients move on alike.
        optim.lr_schedule.step()
        self.audit.after_step()
        optim.zero_grad()
        if has_moved and phase.balance.follows_steps and tasks.names:
            losses = self.losses.without_graph(batch, tasks, share)
            # A step may have led where a loss is NaN; under a policy, the next one is going to be left out.
            if active.guard is None or is_finite([losses]):
                phase.balance.after_step(losses, tasks.subset)

    def _leave_out(
        self,
        active: ActivePhase,
        guard: StepGuard,
        tasks: StepTasks,
        rows: Sequence[LossRow],
        norm: Tensor,
        window: Sequence[Batch],
    ) -> bool:
        """Undoes a step whose loss or gradient is not finite: `not_finite: stop` saves and ends, `skip` continues."""
        guard.undo()
        images = [batch.everyone for batch in window]
        error = active.log.what_is_wrong(self.state.step + 1, tasks.names, rows, norm, images)
        if self.setup.config.not_finite == "stop":
            self.log.not_finite(error, self.state.epoch)
            folder = self.save_within_epoch(active)
            raise Stopped(
                f"stopped: {error.fact}, for images that not_finite.json lists; saved as it was before that step:"
                f" {folder}; not_finite=skip leaves such steps out"
            )
        self.audit.after_backward()
        if self.scaler.is_enabled():
            self.scaler.update()
        active.log.skip()
        self.log.left_out(error)
        return False

    def _has_moved(self, phase: Phase, norm: Tensor) -> bool:
        """Whether a step moved anything: a scaler silently leaves out what overflows. Asked only where it matters."""
        is_asked = self.scaler.is_enabled() and (self.state.ema is not None or phase.balance.follows_steps)
        return not is_asked or is_finite([norm])

    def finish_epoch(self, active: ActivePhase) -> None:
        """Proves the freeze, validates, ends the phase if it is time, and saves the weights that were judged."""
        state, phase, optim = self.state, active.phase, active.optim
        self.audit.verify()  # proven before anything is read off the model or saved
        self.sync.average_statistics(self.setup.root, phase.freeze.plan)
        with state.averaged():
            scores, metrics = self.validate(phase)
            self.log.dashboard.predictions.after_validation(state.epoch, state.step, self.features.peek)
        metrics["train/loss"] = math.nan if optim is None else active.log.mean_loss
        if optim is not None and state.epoch_is_whole:
            phase.balance.after_epoch()
            optim.lr_schedule.epoch_done(metrics)
        if optim is None or state.epoch_is_whole:
            state.validated(metrics)
        if not state.phase_is_over:
            state.time_passed(self.sync.exchange())
        if state.phase_is_over:
            state.scores[phase.name] = scores
        self.save(active, metrics)
        self.sync.exit_if_asked(state.step)

    def save(self, active: ActivePhase, metrics: dict[str, float]) -> None:
        """Logs a validation, and saves the weights that it judged."""
        state, log = self.state, None if active.optim is None else active.log
        row = self._row(active.phase) | {name: value for name, value in metrics.items() if name.startswith("val/")}
        row["audit/violations"] = len(self.audit.report.violations)
        if log is not None:
            row["perf/images_per_s"] = log.images_per_s
        row["perf/train_s"] = state.train_s
        if self.scaler.is_enabled() or self.setup.config.not_finite == "skip":
            row["train/skipped_steps"] = state.num_skipped
        # An evaluation has no weights of its own, unless it comes first.
        has_weights = active.optim is not None or state.step == 0
        links = state.new_best(metrics) if has_weights else []
        row[BEST_SCORE] = state.best.score
        self.log.epoch(row, self.audit.report)
        if has_weights:
            self.checkpoints.write(state, active, row, links)
        self.log.epoch_line(row, log)

    def save_within_epoch(self, active: ActivePhase) -> Path:
        """Saves between two steps; whenever it does, training continues as it would have."""
        active.log.flush()
        self.audit.verify(counted=False)
        self.state.epoch_sums = active.log.state_dict()
        with self.sync.averaged_statistics(self.setup.root, active.phase.freeze.plan) as statistics:
            return self.checkpoints.write(self.state, active, self._row(active.phase), statistics=statistics)

    def result(self) -> RunResult:
        """What the run came to, so far."""
        state = self.state
        return RunResult(
            self.log.run_dir,
            self.setup.trivial,
            state.scores,
            self.audit.report,
            state.best.score,
            state.best.step,
            state.train_s,
        )

    def _audited(self, active: ActivePhase) -> AbstractContextManager[PhaseRecord]:
        """The audit's phase. It receives patterns, not the plan: it draws the contract itself, and fingerprints it."""
        phase, freeze = active.phase, active.phase.freeze
        optimizers: list[HoldsParameters] = []
        if active.optim is not None:
            optimizers = [active.optim.optimizer, phase.balance]
        # How many names a pattern must match was the plan's affair: the audit counts plain tensor attributes as well.
        patterns = [text_of(pattern) for pattern in freeze.patterns]
        # What no active task reaches is frozen, unless the user lets it be: then it is not asked to train.
        idle = () if self.setup.config.unreached == "freeze" else freeze.unreached
        return self.audit.phase(phase.name, patterns, optimizers, idle, freeze.written_at)

    def _batches(self, phase: Phase) -> Generator[Batch]:
        """The batches of the epoch that are left; images whose features are kept are not read."""
        setup, epoch = self.setup, self.state.epoch - 1
        done = (self.state.steps_in_epoch or 0) * phase.optim.accumulate
        return training_batches(
            setup.train,
            phase.batch_size,
            setup.config.seed,
            epoch,
            self.features.view(epoch),
            self.sync.world,
            skip=min(done, phase.order.num_batches(phase.batch_size)),
            loading=Loading(not self.features.keeps, setup.device, setup.workers),
            order=phase.order,
        )

    def _is_save_due(self, phase: Phase) -> bool:
        """Whether to save after a step; the epoch's validation, if that comes next, saves anyway."""
        if self.sync.is_asked_to_end or self.state.steps_in_epoch == phase.steps_per_epoch:
            return self.sync.is_asked_to_end
        return self.checkpoints.is_due(self.state.step, self.sync.seconds)

    def _row(self, phase: Phase) -> dict[str, Any]:
        number = self.state.phase_index + 1
        return {"step": self.state.step, "epoch": self.state.epoch, "phase": phase.name, "phase_number": number}
