"""The audit as a callback of Lightning: `Trainer(callbacks=[AuditCallback(freeze=["trunk"])])`.

It uses `lightning.pytorch` if `lightning` is installed, and `pytorch_lightning` if not. The two are copies of each
other with separate classes, so import the Trainer from the one that is used here.
"""

# Lightning passes arguments that not every hook needs.
# ruff: noqa: ARG002

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from mtl.audit.audit import GradientAudit
from mtl.audit.fit import FitCallback

if TYPE_CHECKING or find_spec("lightning"):
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    from pytorch_lightning import Callback, LightningModule, Trainer


class AuditCallback(FitCallback, Callback):
    """Audits every `fit`, with automatic and with manual optimization.

    One freeze for all epochs is one phase. Freeze before the training starts: in the module's constructor,
    `configure_model`, `setup` or `on_fit_start`, since the phase opens when the callbacks' `on_train_start` are called,
    before the module's own.

    A freeze by epoch is a phase for each freeze: `AuditCallback(freeze={0: ["backbone"], 10: []})` allows for a thaw in
    epoch 10, as `BackboneFinetuning` does it. Such a phase opens with the first batch of its epochs, after all
    callbacks' and the module's `on_train_epoch_start`, so that the order of callbacks that freeze or thaw does not
    matter. It is closed and proven in the callbacks' `on_train_epoch_end` of its last epoch.

    Names are those of the LightningModule. Every step of every optimizer counts, as in `trainer.global_step`.

    Every byte is compared before a validation, before a checkpoint is written (not if it is saved with
    `save_weights_only`, for which Lightning calls no callback), and at the end of a phase. Changes between two
    phases, or after the callbacks' `on_train_end`, are not observed.

    Attributes:
        report: The findings; each `fit` adds a phase for every freeze.
    """

    _handles: Sequence[RemovableHandle] = ()

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
        # A function is not called for an epoch that does not come.
        if trainer.current_epoch + 1 != trainer.max_epochs:
            self._fit.leave(trainer.current_epoch + 1)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        # After backward, accumulation and unscaling, before clipping; under manual optimization as well.
        self._fit.check(GradientAudit.after_backward)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # No phase is open during the sanity check and `trainer.validate`.
        self._fit.check(GradientAudit.verify)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._fit.check(GradientAudit.verify)

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
        self._handles = ()

    def _after_step(self, *_: object) -> None:
        self._fit.check(GradientAudit.after_step)
