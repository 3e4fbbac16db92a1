"""The audit as a callback of the Hugging Face Trainer: `Trainer(..., callbacks=[AuditCallback(freeze=["trunk"])])`."""

# The Trainer's hooks give what not every hook needs.
# ruff: noqa: ARG002

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mtl.audit.audit import Policy
from mtl.audit.fit import FitAudit
from mtl.patterns import PatternLike


class AuditCallback(TrainerCallback):
    """Audits every `train` as one phase.

    The Trainer calls `model.train()` before every batch, which wakes a frozen BatchNorm unless the model's own `train`
    puts it back to eval.

    Every byte is compared before and after an evaluation, before and after a checkpoint is written, and at the end.
    There is no hook right before a checkpoint: it is seen coming by `control.should_save` at the end of a step or an
    epoch. One that a later callback asks for, or that waits for its evaluation (`save_strategy="best"`), is compared
    before that evaluation, if it has one, and once it is written.

    The Trainer tells its callbacks nothing of an exception. The phase then stays open, which proves nothing, so that
    its record says `completed: false`; the next `train` closes it so.

    Attributes:
        report: What was found, a phase for each `train`.
    """

    def __init__(
        self, freeze: PatternLike | Sequence[PatternLike], policy: Policy = "raise", phase: str = "fit"
    ) -> None:
        """Args:
        freeze: Patterns of what must not move.
        policy: What a violation does, as of `GradientAudit`. Under `raise` the `AuditError` comes out of `train`.
        phase: The phase's name in the report.
        """
        self._fit = FitAudit(freeze, policy, phase)
        self.report = self._fit.report

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Nobody tells of an exception in the training before this one: `begin` closes what it left open.
        self._fit.begin(kwargs["model"], [innermost(kwargs["optimizer"])])

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
