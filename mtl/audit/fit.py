"""Each training of a framework's Trainer as one phase of an audit, opened and closed by hooks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from mtl.audit.audit import GradientAudit, Policy
from mtl.audit.membership import HoldsParameters
from mtl.audit.report import Report
from mtl.patterns import PatternLike


class FitAudit:
    """What the callbacks of all frameworks share. Outside a training, when hooks come too, nothing is looked at.

    Attributes:
        report: What was found, a phase for each training.
    """

    def __init__(self, freeze: PatternLike | Sequence[PatternLike], policy: Policy, phase: str) -> None:
        """Args: as the callbacks have them."""
        self.report = Report()
        self._freeze = freeze
        self._policy = policy
        self._phase = phase
        self._audit: GradientAudit | None = None

    def begin(self, model: nn.Module, optimizers: Sequence[HoldsParameters]) -> None:
        """Opens the phase of one training; one that an exception has left open is closed unproven."""
        self.abandon()
        audit = GradientAudit(model, self._freeze, optimizers, self._policy)
        try:
            audit.begin(self._phase)
        finally:
            # Also if the contract is already broken: the report then tells of it.
            self.report.phases += audit.report.phases
        self._audit = audit

    def after_backward(self) -> None:
        if self._audit is not None:
            self._audit.after_backward()

    def after_step(self) -> None:
        if self._audit is not None:
            self._audit.after_step()

    def verify(self) -> None:
        if self._audit is not None:
            self._audit.verify()

    def end(self) -> None:
        """Closes the phase with its proof."""
        audit, self._audit = self._audit, None
        if audit is not None:
            audit.end()

    def abandon(self) -> None:
        """Closes the phase with nothing proven."""
        audit, self._audit = self._audit, None
        if audit is not None:
            audit.abandon()
