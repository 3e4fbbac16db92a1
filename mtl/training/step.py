"""One optimizer step: losses -> backward -> audit -> step -> log, over the batches of a window."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.amp import GradScaler

from mtl.audit import GradientAudit
from mtl.data import Batch
from mtl.distributed.world import World
from mtl.optim.optimizers import parameters_of
from mtl.phases.resolve import Phase
from mtl.runtime.console import logger
from mtl.training.keeper import Keeper, Stepping
from mtl.training.nonfinite import NotFiniteError, StepGuard, gradient_norm, is_finite
from mtl.training.objective import Objective
from mtl.training.setup import Parts
from mtl.training.step_sync import Consensus
from mtl.training.tracking.gradients import GradientLog
from mtl.training.tracking.steps import StepLog


@dataclass
class Stepper:
    """Takes the steps of one epoch. For each: `take`; `leave_out` if it could not be taken; `finish`."""

    parts: Parts
    objective: Objective
    consensus: Consensus
    keeper: Keeper
    audit: GradientAudit
    gradients: GradientLog
    scaler: GradScaler
    world: World
    phase: Phase
    stepping: Stepping
    log: StepLog
    _guard: StepGuard | None = field(init=False, default=None)
    _has_moved: bool = field(init=False, default=False)
    # The last batch, and what its losses count.
    _last: tuple[Batch, Tensor | None] = field(init=False)

    def __post_init__(self) -> None:
        self._tasks = {name: self.parts.tasks[name] for name in self.phase.tasks}
        self._trainable = parameters_of(self.stepping.optimizer)
        if self.parts.config.not_finite != "raise":
            self._guard = StepGuard(self.parts.root, self.phase.balance)

    def take(self, window: Sequence[Batch], step: int) -> NotFiniteError | None:
        """Computes losses and gradients, and steps what trains.

        Args:
            window: The batches whose gradients make the step.
            step: Steps done in the run, without this one.

        Returns:
            What was not finite, if a policy wants it known before the step: it is not taken, and all that its forward
            has moved is as it was.
        """
        if self._guard is not None:
            self._guard.before()
        rows = self._backward(window, step)
        self.scaler.unscale_(self.stepping.optimizer)
        norm = gradient_norm(self._trainable, self.phase.optim.clip_norm)
        indices = [batch.everyone for batch in window]
        # Gradients of fp16 are the scaler's affair.
        judged = rows if self.scaler.is_enabled() else [*rows, norm]
        if self._guard is not None and not is_finite(judged):
            self._guard.undo()
            return self.log.what_is_wrong(step + 1, rows, norm, indices)
        self.audit.after_backward()
        lr = self.stepping.lr_schedule.max_lr
        self.scaler.step(self.stepping.optimizer)
        self.scaler.update()
        ema, is_followed = self.keeper.ema, self.phase.balance.follows_steps
        # A scaler leaves out what overflows without a word: then nothing has moved that could be followed.
        is_asked = self.scaler.is_enabled() and (ema is not None or is_followed)
        self._has_moved = not is_asked or is_finite([norm])
        if ema is not None and self._has_moved:
            ema.update()
        self.log.add(step + 1, rows, norm, lr, indices)
        return None

    def _backward(self, window: Sequence[Batch], step: int) -> list[Tensor]:
        """Leaves the window's gradients; returns of each batch the loss that is minimised and those of the tasks."""
        shares, rows = self.consensus.shares(window, self._tasks), []
        # Where layers speak to other processes in their backward, all have to go through it.
        is_analysed = self.world.leads or self.parts.config.distributed.sync_batchnorm
        for number, batch in enumerate(window):
            share = None if shares is None else shares[number]
            self._last = batch, share
            # Gradients are shared with those of the window's last batch.
            with nullcontext() if number == len(window) - 1 else self.stepping.replica.no_sync():
                total, losses, each = self.stepping.replica(self.objective, batch, self.phase, share, step)
                if is_analysed:
                    self.gradients.before_backward(each, step + 1, self.log)
                rows.append(torch.cat([total.detach()[None], losses.detach()]))
                # The loss of a method that looks at gradients goes back through no graph, and frees none.
                del losses, each
                self.scaler.scale(total / len(window)).backward()
        return rows

    def leave_out(self, wrong: NotFiniteError) -> None:
        """Goes on without the step that was not taken."""
        self._has_moved = False
        self.audit.after_backward()
        if self.scaler.is_enabled():
            self.scaler.update()
        self.log.skip()
        logger.warning(f"{wrong.fact}: the step is left out")

    def finish(self) -> None:
        """What follows a step, whether or not it was taken."""
        self.stepping.lr_schedule.step()
        self.audit.after_step()
        self.stepping.optimizer.zero_grad(set_to_none=True)
        if self._has_moved and self.phase.balance.follows_steps:
            batch, share = self._last
            losses = self.objective.losses(batch, self.phase, share)
            # A step may have led where a loss is no number; under a policy, the next one is going to be left out.
            if self._guard is None or is_finite([losses]):
                self.phase.balance.after_step(losses)
