"""The audit as a callback of the Hugging Face Trainer: `Trainer(..., callbacks=[AuditCallback(freeze=["trunk"])])`."""

# The Trainer passes arguments that not every hook needs.
# ruff: noqa: ARG002

from __future__ import annotations

from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mtl.audit.audit import GradientAudit
from mtl.audit.fit import FitCallback


class AuditCallback(FitCallback, TrainerCallback):
    """Audits every `train`.

    One freeze for all epochs is one phase, from `on_train_begin` on. A freeze by epoch is a phase for each freeze:
    `AuditCallback(freeze={0: ["trunk"], 3: []})` allows for a thaw in epoch 3. Such a phase opens with the first step
    of its epochs, after all callbacks' `on_epoch_begin`, so that their order does not matter. It is closed and proven
    in the callback's `on_epoch_end` of its last epoch.

    The Trainer calls `model.train()` before every batch, which puts a frozen BatchNorm in train mode unless the model's
    own `train` puts it back to eval.

    Every byte is compared before and after an evaluation, before and after a checkpoint is written, and at the end of a
    phase; changes between two phases, as in the evaluation after the last epoch of the first one, are not observed.
    There is no hook right before a checkpoint, so `control.should_save` at the end of a step or an epoch announces it.
    One that a later callback requests, or that waits for its evaluation (`save_strategy="best"`), is checked before
    that evaluation, if it has one, and once it is written.

    The Trainer does not report an exception to its callbacks. The phase then stays open and its record says
    `completed: false`: nothing is proven. The next `train` closes it.

    Attributes:
        report: The findings; each `train` adds a phase for every freeze.
    """

    _epoch = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # No hook reports an exception in an earlier training: `start` closes the phase that it left open.
        self._fit.start(kwargs["model"], [innermost(kwargs["optimizer"])])
        # Counted here, from the checkpoint's epoch: `state.epoch` falls behind if an epoch is stopped early.
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
        self._fit.check(GradientAudit.after_backward)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Called for a step that the gradient scaler skipped, too.
        if not getattr(kwargs["optimizer"], "step_was_skipped", False):
            self._fit.check(GradientAudit.after_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._verify_before(control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._verify_before(control)
        # A function is not called for an epoch that does not come.
        if self._epoch + 1 < state.num_train_epochs:
            self._fit.leave(self._epoch + 1)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._fit.check(GradientAudit.verify)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._fit.check(GradientAudit.verify)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._fit.end()

    def _verify_before(self, control: TrainerControl) -> None:
        # The Trainer's own callback sets these, before any of the user's is called.
        if control.should_evaluate or control.should_save:
            self._fit.check(GradientAudit.verify)


def innermost(optimizer: Any) -> Any:
    """The torch optimizer inside accelerate's wrappers."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer
