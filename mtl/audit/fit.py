"""Each training of a framework's Trainer as phases of an audit, opened and closed by hooks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from mtl.audit.audit import GradientAudit
from mtl.audit.report import Report
from mtl.audit.watch.contract import Subject, draw_contract
from mtl.audit.watch.epochs import EpochFreeze, FreezeByEpoch, Span
from mtl.audit.watch.membership import HoldsParameters
from mtl.audit.watch.reporting import Policy


class FitAudit:
    """What the callbacks of all frameworks share. Outside a training, when hooks come too, nothing is looked at.

    Attributes:
        report: What was found, in each training a phase for every freeze.
    """

    def __init__(self, freeze: EpochFreeze, policy: Policy, phase: str, strict: bool) -> None:
        """Args: as the callbacks have them."""
        self.report = Report()
        self._freeze = FreezeByEpoch(freeze, phase)
        self._policy = policy
        self._strict = strict
        self._audit: GradientAudit | None = None
        self._span: Span | None = None

    def start(self, model: nn.Module, optimizers: Sequence[HoldsParameters]) -> None:
        """Begins a training; a phase that an exception has left open is closed unproven.

        One freeze for all epochs begins here. Where epochs differ, each begins with its first batch: by then, whoever
        freezes and thaws at the start of an epoch has done so.

        Raises:
            PatternError: A pattern of any epoch that is known beforehand cannot be read or selects nothing.
        """
        self.abandon()
        self._audit = GradientAudit(model, policy=self._policy, strict=self._strict)
        # What was found in earlier trainings stays; a contract that is broken from the start is in it, too.
        self._audit.report = self.report
        for span in self._freeze.spans if self._freeze.varies else ():
            draw_contract(Subject(model, {}, None), span.freeze)
        if not self._freeze.varies:
            self._begin(self._freeze.at(0), optimizers)

    def enter(self, epoch: int, optimizers: Sequence[HoldsParameters]) -> bool:
        """Before a batch: begins the phase of its epoch, unless it is open.

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
        """At the end of an epoch: closes the phase with its proof if the following epoch has another freeze."""
        if self._span is not None and self._freeze.at(following) != self._span:
            self._close()

    def after_backward(self) -> None:
        if self._audit is not None and self._span is not None:
            self._audit.after_backward()

    def after_step(self) -> None:
        if self._audit is not None and self._span is not None:
            self._audit.after_step()

    def verify(self) -> None:
        if self._audit is not None and self._span is not None:
            self._audit.verify()

    def end(self) -> None:
        """Ends a training: closes the phase, if one is open, with its proof."""
        self._close()
        self._audit = None

    def abandon(self) -> None:
        """Ends a training: closes the phase, if one is open, with nothing proven."""
        audit, self._audit, self._span = self._audit, None, None
        if audit is not None:
            audit.abandon()

    def _close(self) -> None:
        span, self._span = self._span, None
        if self._audit is not None and span is not None:
            self._audit.end()

    def _begin(self, span: Span, optimizers: Sequence[HoldsParameters]) -> None:
        assert self._audit is not None
        self._audit.begin(span.name, span.freeze, optimizers)
        self._span = span
