"""Steps of heads on kept features, several in a row: those of `Trainer.train_step`, with nothing in between.

The loop has two paths, this one and `train_step`. Each step here is one there, to the bit, under the conditions of
`HeadSteps.num_possible` and where no label is missing; `tests/training/test_head_steps.py` trains by both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Adam, AdamW

from mtl.audit import GradientAudit
from mtl.data import Batch
from mtl.phases.resolve import Phase
from mtl.phases.reuse import FEWEST_IN_A_ROW, most_in_a_row
from mtl.training.checkpoints import CheckpointWriter
from mtl.training.features import FeatureSource
from mtl.training.nonfinite import gradient_norm, total_norm
from mtl.training.phase import ActivePhase, PhaseOptimizer
from mtl.training.state import RunState
from mtl.training.step import StepLosses
from mtl.training.tracking.steps import LossRow

# Optimizers that write to no gradient, and how much of these is kept for the end of a row.
_READ_ONLY, _MOST_GRADIENT_BYTES = (Adam, AdamW), 1 << 24


class HeadSteps:
    """One for each run. The weights that it ends with are those of the plain loop, to the bit."""

    def __init__(
        self,
        state: RunState,
        audit: GradientAudit,
        features: FeatureSource,
        losses: StepLosses,
        checkpoints: CheckpointWriter,
    ) -> None:
        self._state = state
        self._checkpoints = checkpoints
        self._audit = audit
        self._features = features
        self._losses = losses

    def num_possible(self, phase: Phase) -> int:
        """How many of the next steps of a phase can be taken in a row: up to the next one with a check of the audit."""
        state, setup = self._state, self._state.setup
        if not self._features.trunk_rests or not state.world.is_alone:
            return 0
        most = most_in_a_row(setup.config, phase, self._features.bytes_per_image)
        number = state.scheduler.steps_left(min(most, self._audit.num_unchecked))
        number = self._checkpoints.steps_left(state.step, number)
        return number if number >= FEWEST_IN_A_ROW else 0

    def __call__(self, active: ActivePhase, optim: PhaseOptimizer, batches: Sequence[Batch]) -> None:
        """Takes a step with each batch; all tasks of the phase have labels in each of them."""
        phase, step = active.phase, self._state.step
        rows = list[tuple[LossRow, Tensor | list[Tensor], dict[str, float]]]()
        keeps_gradients = _can_keep_gradients(phase, optim, len(batches))
        with self._audit.unchecked(optim.optimizer, len(batches)):
            for batch, features in zip(batches, self._features.several(batches), strict=True):
                losses = torch.stack(self._losses.each_loss(batch, phase.tasks, features))
                total = phase.balance(losses)
                total.backward()
                norm: Tensor | list[Tensor] = [each.grad for each in optim.trainable if each.grad is not None]
                if not (norm and keeps_gradients):
                    norm = gradient_norm(optim.trainable, phase.optim.clip_norm)
                rates = optim.rates
                optim.optimizer.step()
                optim.lr_schedule.step()
                optim.zero_grad()
                rows.append(((total.detach(), losses.detach()), norm, rates))
        for number, (batch, (loss, norm, rates)) in enumerate(zip(batches, rows, strict=True), start=1):
            known = norm if isinstance(norm, Tensor) else total_norm(norm)
            active.log.add(step + number, phase.tasks, [loss], known, rates, [batch.everyone])


def _can_keep_gradients(phase: Phase, optim: PhaseOptimizer, num_steps: int) -> bool:
    """Whether the norms of a row's gradients can be had after it, one after the other, in half the time."""
    num_bytes = num_steps * sum(each.numel() * each.element_size() for each in optim.trainable)
    return phase.optim.clip_norm is None and type(optim.optimizer) in _READ_ONLY and num_bytes <= _MOST_GRADIENT_BYTES
