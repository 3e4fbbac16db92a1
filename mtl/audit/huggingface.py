"""The audit as a callback of the Hugging Face Trainer: `Trainer(..., callbacks=[AuditCallback(freeze=["trunk"])])`."""

# The Trainer's hooks give what not every hook needs.
# ruff: noqa: ARG002

from __future__ import annotations

from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mtl.audit.fit import FitAudit
from mtl.audit.watch.epochs import EpochFreeze
from mtl.audit.watch.reporting import Policy


class AuditCallback(TrainerCallback):
    """Audits every `train`.

    One freeze for all epochs is one phase, from `on_train_begin` on. A freeze by epoch is a phase for each freeze:
    `AuditCallback(freeze={0: ["trunk"], 3: []})` allows for a thaw in epoch 3. Such a phase opens with the first step
    of its epochs, when all callbacks' `on_epoch_begin` are done, so that it does not matter in which order they are
    listed. It is closed and proven at the callback's `on_epoch_end` of its last epoch.

    The Trainer calls `model.train()` before every batch, which wakes a frozen BatchNorm unless the model's own `train`
    puts it back to eval.

    Every byte is compared before and after an evaluation, before and after a checkpoint is written, and at the end of a
    phase; what happens between two phases, such as the evaluation after the last epoch of the first one, is not seen.
    There is no hook right before a checkpoint: it is seen coming by `control.should_save` at the end of a step or an
    epoch. One that a later callback asks for, or that waits for its evaluation (`save_strategy="best"`), is compared
    before that evaluation, if it has one, and once it is written.

    The Trainer tells its callbacks nothing of an exception. The phase then stays open, which proves nothing, so that
    its record says `completed: false`; the next `train` closes it so.

    Attributes:
        report: What was found, in each `train` a phase for every freeze.
    """

    def __init__(self, freeze: EpochFreeze, policy: Policy = "raise", phase: str = "fit", strict: bool = False) -> None:
        """Args:
            freeze: Patterns of what must not move. By epoch, {first epoch: patterns}, where the first epoch is counted
                from 0 and patterns hold until the next one; or a function of the epoch that returns patterns, which is
                asked for each epoch at the end of the one before. No patterns freeze nothing.
            policy: What a violation does, as of `GradientAudit`. Under `raise` the `AuditError` comes out of `train`.
            phase: The phase's name in the report; `phase[0-2]` and `phase[3-]` of a freeze by epoch.
            strict: Whether a hazard is a violation, as of `GradientAudit`.

        Raises:
            ValueError: The freeze is none of these, or has none for epoch 0.
        """
        self._fit = FitAudit(freeze, policy, phase, strict)
        self.report = self._fit.report
        self._epoch = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Nobody tells of an exception in the training before this one: `start` closes what it left open.
        self._fit.start(kwargs["model"], [innermost(kwargs["optimizer"])])
        # Counted here from where a checkpoint stood: `state.epoch` lags behind if an epoch is stopped early.
        self._epoch = int(state.epoch or 0) - 1

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._epoch += 1

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._fit.enter(self._epoch, [innermost(kwargs["optimizer"])])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # After backward, accumulation and clipping.
        self._fit.after_backward()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Called for a step that the gradient scaler skipped, too.
        if not getattr(kwargs["optimizer"], "step_was_skipped", False):
            self._fit.after_step()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._verify_before(control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._verify_before(control)
        # A function is not asked for an epoch that does not come.
        if self._epoch + 1 < state.num_train_epochs:
            self._fit.leave(self._epoch + 1)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._fit.verify()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._fit.verify()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._fit.end()

    def _verify_before(self, control: TrainerControl) -> None:
        # The Trainer's own callback, which sets these, comes before any of the user's.
        if control.should_evaluate or control.should_save:
            self._fit.verify()


def innermost(optimizer: Any) -> Any:
    """The torch optimizer inside what accelerate makes of it."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer
