"""The audit as a callback of Lightning: `Trainer(callbacks=[AuditCallback(freeze=["trunk"])])`.

`lightning.pytorch` is taken if `lightning` is installed, and `pytorch_lightning` only if it is not. The two are copies
of each other with classes of their own, so import the Trainer from the one that is taken here.
"""

# Lightning's hooks give what not every hook needs.
# ruff: noqa: ARG002

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from mtl.audit.audit import Policy
from mtl.audit.fit import FitAudit
from mtl.patterns import PatternLike

if TYPE_CHECKING or find_spec("lightning"):
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    from pytorch_lightning import Callback, LightningModule, Trainer


class AuditCallback(Callback):
    """Audits every `fit` as one phase, with automatic and with manual optimization.

    Freeze before the training starts: in the module's constructor, `configure_model`, `setup` or `on_fit_start`, since
    the phase opens when the callbacks' `on_train_start` are called, before the module's own. Names are those of the
    LightningModule. Every step of every optimizer counts, as in `trainer.global_step`.

    Every byte is compared before a validation, before a checkpoint is written (not if it is saved with
    `save_weights_only`, for which Lightning calls no callback), and at the end. What breaks the freeze after the
    callbacks' `on_train_end` is not seen.

    Attributes:
        report: What was found, a phase for each `fit`.
    """

    def __init__(
        self, freeze: PatternLike | Sequence[PatternLike], policy: Policy = "raise", phase: str = "fit"
    ) -> None:
        """Args:
        freeze: Patterns of what must not move.
        policy: What a violation does, as of `GradientAudit`. Under `raise` the `AuditError` comes out of `fit`.
        phase: The phase's name in the report.
        """
        self._fit = FitAudit(freeze, policy, phase)
        self.report = self._fit.report
        self._handles: list[RemovableHandle] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._fit.begin(pl_module, trainer.optimizers)
        # Batches do not count: accumulation ends most of them without a step, and a gradient scaler skips some.
        self._handles = [each.register_step_post_hook(self._after_step) for each in trainer.optimizers]

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

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _after_step(self, *_: object) -> None:
        self._fit.after_step()
