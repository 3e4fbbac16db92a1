"""The audit as a callback of Lightning: `Trainer(callbacks=[AuditCallback(freeze=["trunk"])])`.

`lightning.pytorch` is taken if `lightning` is installed, and `pytorch_lightning` only if it is not. The two are copies
of each other with classes of their own, so import the Trainer from the one that is taken here.
"""

# Lightning's hooks give what not every hook needs.
# ruff: noqa: ARG002

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from mtl.audit.fit import FitAudit
from mtl.audit.watch.epochs import EpochFreeze
from mtl.audit.watch.reporting import Policy

if TYPE_CHECKING or find_spec("lightning"):
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    from pytorch_lightning import Callback, LightningModule, Trainer


class AuditCallback(Callback):
    """Audits every `fit`, with automatic and with manual optimization.

    One freeze for all epochs is one phase. Freeze before the training starts: in the module's constructor,
    `configure_model`, `setup` or `on_fit_start`, since the phase opens when the callbacks' `on_train_start` are called,
    before the module's own.

    A freeze by epoch is a phase for each freeze: `AuditCallback(freeze={0: ["backbone"], 10: []})` allows for a thaw in
    epoch 10, as `BackboneFinetuning` does it. Such a phase opens with the first batch of its epochs, when all
    callbacks' and the module's `on_train_epoch_start` are done, so that it does not matter who of them freezes or
    thaws, or in which order they are listed. It is closed and proven when the callbacks' `on_train_epoch_end` are
    called for its last epoch.

    Names are those of the LightningModule. Every step of every optimizer counts, as in `trainer.global_step`.

    Every byte is compared before a validation, before a checkpoint is written (not if it is saved with
    `save_weights_only`, for which Lightning calls no callback), and at the end of a phase. What breaks the freeze
    between two phases, or after the callbacks' `on_train_end`, is not seen.

    Attributes:
        report: What was found, in each `fit` a phase for every freeze.
    """

    def __init__(self, freeze: EpochFreeze, policy: Policy = "raise", phase: str = "fit", strict: bool = False) -> None:
        """Args:
            freeze: Patterns of what must not move. By epoch, {first epoch: patterns}, where the first epoch is counted
                from 0 and patterns hold until the next one; or a function of the epoch that returns patterns, which is
                asked for each epoch at the end of the one before. No patterns freeze nothing.
            policy: What a violation does, as of `GradientAudit`. Under `raise` the `AuditError` comes out of `fit`.
            phase: The phase's name in the report; `phase[0-9]` and `phase[10-]` of a freeze by epoch.
            strict: Whether a hazard is a violation, as of `GradientAudit`.

        Raises:
            ValueError: The freeze is none of these, or has none for epoch 0.
        """
        self._fit = FitAudit(freeze, policy, phase, strict)
        self.report = self._fit.report
        self._handles: list[RemovableHandle] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._unhook()
        self._fit.start(pl_module, trainer.optimizers)
        self._hook(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        if self._fit.enter(trainer.current_epoch, trainer.optimizers):
            # A callback that thaws may have built other optimizers.
            self._unhook()
            self._hook(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A function is not asked for an epoch that does not come.
        if trainer.current_epoch + 1 != trainer.max_epochs:
            self._fit.leave(trainer.current_epoch + 1)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        # After backward, accumulation and unscaling, before clipping; under manual optimization as well.
        self._fit.after_backward()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The sanity check and `trainer.validate` come when no phase is open.
        self._fit.verify()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._fit.verify()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._unhook()
        self._fit.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._unhook()
        self._fit.abandon()

    def _hook(self, trainer: Trainer) -> None:
        # Batches do not count: accumulation ends most of them without a step, and a gradient scaler skips some.
        self._handles = [each.register_step_post_hook(self._after_step) for each in trainer.optimizers]

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _after_step(self, *_: object) -> None:
        self._fit.after_step()
