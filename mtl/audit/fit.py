"""Audits a training from outside, by hooks: of a plain loop (`attach`), or of a framework's Trainer (`FitCallback`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn
from torch.optim import Optimizer

from mtl.audit.audit import GradientAudit
from mtl.audit.epochs import EpochFreeze, EpochSpan, FreezeByEpoch, Patterns
from mtl.audit.policy import Policy
from mtl.audit.report import Report
from mtl.audit.watch.contract import AuditTarget, build_contract
from mtl.audit.watch.optimizers import HoldsParameters


def attach(
    model: nn.Module,
    *optimizers: Optimizer,
    freeze: Patterns,
    policy: Policy = "raise",
    phase: str = "training",
    idle: Patterns = (),
    strict: bool = False,
) -> GradientAudit:
    """Audits a loop without an edit of it: checks every step of these optimizers from now on.

    Returns:
        The audit, with an open phase, which its `end()` closes with the proof.

    Raises: as for `GradientAudit`, its `attach`, and `begin`.
    """
    audit = GradientAudit(model, freeze, policy=policy, strict=strict)
    audit.attach(*optimizers)
    audit.begin(phase, idle=idle)
    return audit


class FitAudit:
    """The audit of a Trainer's trainings, for the callbacks of all frameworks: a phase for every freeze.

    Attributes:
        report: The findings of all trainings, each with a phase for every freeze.
    """

    def __init__(self, freeze: EpochFreeze, policy: Policy, phase: str, strict: bool) -> None:
        """Args: as the callbacks have them."""
        self.report = Report()
        self._freeze = FreezeByEpoch(freeze, phase)
        self._policy = policy
        self._strict = strict
        self._audit: GradientAudit | None = None
        self._span: EpochSpan | None = None

    def start(self, model: nn.Module, optimizers: Sequence[HoldsParameters]) -> None:
        """Starts a training; a phase that an exception left open is closed unproven.

        A freeze for all epochs begins here. If epochs differ, each phase begins with its first batch, after callbacks
        have frozen and thawed at the start of the epoch.

        Raises:
            PatternError: A pattern of any epoch that is known by now cannot be read or selects nothing.
        """
        self.abandon()
        self._audit = GradientAudit(model, policy=self._policy, strict=self._strict)
        # One report for all trainings, also if this one's contract is broken from the start.
        self._audit.report = self.report
        for span in self._freeze.spans if self._freeze.varies else ():
            build_contract(AuditTarget(model, {}, None), span.freeze)
        if not self._freeze.varies:
            self._begin(self._freeze.at(0), optimizers)

    def enter(self, epoch: int, optimizers: Sequence[HoldsParameters]) -> bool:
        """Call before a batch: begins the phase of its epoch, unless it is open.

        Returns:
            Whether a phase was begun.
        """
        span = self._freeze.at(epoch)
        if span == self._span:
            return False
        self._close()
        self._begin(span, optimizers)
        return True

    def leave(self, following: int) -> None:
        """Call at the end of an epoch: closes and proves the phase if the following epoch has another freeze."""
        if self._span is not None and self._freeze.at(following) != self._span:
            self._close()

    def check(self, method: Callable[[GradientAudit], None]) -> None:
        """Calls a check of the audit if a phase is open: Trainers call their hooks outside a training, too."""
        if self._audit is not None and self._span is not None:
            method(self._audit)

    def end(self) -> None:
        """Ends a training: closes and proves the phase, if one is open."""
        self._close()
        self._audit = None

    def abandon(self) -> None:
        """Ends a training: closes the phase unproven, if one is open."""
        audit, self._audit, self._span = self._audit, None, None
        if audit is not None:
            audit.abandon()

    def _close(self) -> None:
        span, self._span = self._span, None
        if self._audit is not None and span is not None:
            self._audit.end()

    def _begin(self, span: EpochSpan, optimizers: Sequence[HoldsParameters]) -> None:
        assert self._audit is not None
        self._audit.begin(span.name, span.freeze, optimizers)
        self._span = span


class FitCallback:
    """The common part of the callbacks of all frameworks: the freeze, the policy and the report."""

    def __init__(self, freeze: EpochFreeze, policy: Policy = "raise", phase: str = "fit", strict: bool = False) -> None:
        """Args:
            freeze: Patterns of the frozen tensors. By epoch, {first epoch: patterns}, where epochs are counted from 0
                and patterns hold until the next key; or a function from the epoch to patterns, which is called at the
                end of the epoch before. No patterns freeze nothing.
            policy: What a violation does, as in `GradientAudit`. Under `raise` the Trainer's call raises `AuditError`.
            phase: The phase's name in the report; `phase[0-2]` and `phase[3-]` of a freeze by epoch.
            strict: Whether a hazard is a violation, as in `GradientAudit`.

        Raises:
            ValueError: The freeze is none of these, or has none for epoch 0.
        """
        self._fit = FitAudit(freeze, policy, phase, strict)
        self.report = self._fit.report
