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

from mtl.audit.audit import GradientAudit, Policy
from mtl.audit.report import Report
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
        self.report = Report()
        self._freeze = freeze
        self._policy = policy
        self._phase = phase
        self._audit: GradientAudit | None = None
        self._handles: list[RemovableHandle] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        audit = GradientAudit(pl_module, self._freeze, trainer.optimizers, self._policy)
        try:
            audit.begin(self._phase)
        finally:
            # Also if the contract is already broken: the report then tells of it.
            self.report.phases += audit.report.phases
        self._audit = audit
        # Batches do not count: accumulation ends most of them without a step, and a gradient scaler skips some.
        self._handles = [each.register_step_post_hook(self._after_step) for each in trainer.optimizers]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        # After backward, accumulation and unscaling, before clipping; under manual optimization as well.
        if self._audit is not None:
            self._audit.after_backward()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The sanity check and `trainer.validate` come when no phase is open.
        if self._audit is not None:
            self._audit.verify()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._audit is not None:
            self._audit.verify()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (audit := self._close()) is not None:
            audit.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if (audit := self._close()) is not None:
            audit.abandon()

    def _close(self) -> GradientAudit | None:
        """Looks at nothing from now on; the audit that was open is the caller's to end."""
        audit, self._audit = self._audit, None
        for handle in self._handles:
            handle.remove()
        self._handles = []
        return audit

    def _after_step(self, *_: object) -> None:
        if self._audit is not None:
            self._audit.after_step()
