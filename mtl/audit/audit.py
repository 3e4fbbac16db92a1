"""`GradientAudit`: the contract of each phase, checked between steps and proven at its end."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, get_args

from torch import nn
from torch.autograd.graph import register_multi_grad_hook
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from mtl.audit.contract import Subject
from mtl.audit.membership import HoldsParameters, tells_of_steps
from mtl.audit.phasewatch import PhaseWatch
from mtl.audit.report import AuditError, PhaseRecord, Report, Violation
from mtl.patterns import PatternLike, as_list

Policy = Literal["raise", "warn", "collect", "restore"]


class GradientAudit:
    """Proves that frozen tensors stay bit-identical and receive no gradient, and that all others train.

    Between steps it looks at cheap signs (tripwires), at the bytes of small buffers, and at those of some parameters in
    turn, with no host sync on a GPU; whenever it is asked to `verify`, and when a phase ends, it compares the bytes of
    every frozen tensor. A tensor's version counter makes it look at the bytes, but is never itself a verdict. What
    happens between two phases is not watched. It keeps a copy of every frozen tensor on the host.
    """

    def __init__(
        self,
        model: nn.Module,
        freeze: PatternLike | Sequence[PatternLike] = (),
        optimizers: Sequence[HoldsParameters] = (),
        policy: Policy = "raise",
        also: Mapping[str, nn.Module] | None = None,
        ema: nn.Module | None = None,
    ) -> None:
        """Args:
            model: The module whose tensors are watched; of a wrapper (DDP, torch.compile), the module inside it.
            freeze: Patterns (see `mtl.patterns`) of what must not move; `phase` may name others. Rows of a tensor are
                `head.weight[0:10]`.
            optimizers: Every optimizer that steps parameters of the model; with none, it is not asked what trains.
            policy: What a violation does: raise `AuditError`, warn and go on, only collect, or restore: put the frozen
                bits, flags and modes back and go on.
            also: Modules beside the model that take part in training, such as losses that learn; the names of their
                tensors begin with the names given here.
            ema: An averaged copy of the model: what is frozen in the model must keep its bits there as well (`ema.*`).

        Raises:
            ValueError: The policy is none of these.
            TypeError: What is given as optimizers is no list of such.
        """
        if policy not in get_args(Policy):
            raise ValueError(f"expected the policy raise, warn, collect or restore, got {policy!r}")
        self.report = Report()
        self._subject = Subject(model, dict(also or {}), ema)
        self._freeze = as_list(freeze)
        self._optimizers = _checked(optimizers)
        self._policy = policy
        self._open: PhaseWatch | None = None
        self._seen: set[tuple[str, str]] = set()
        self._handles: list[RemovableHandle] = []
        self._attached: list[Optimizer] = []

    def watch(self, optimizer: HoldsParameters) -> None:
        """Adds an optimizer that was built after the audit."""
        self._optimizers += _checked([optimizer])
        if self._open is not None:
            self._listen(optimizer)

    def attach(self, *optimizers: Optimizer) -> None:
        """Looks at every step of these optimizers by itself: a loop then needs nothing of the audit but `phase`.

        Optimizers that step in turn share the count: its steps are those of the one that has stepped most often. While
        no phase is open nothing is looked at, and no hook is left on the optimizers.
        """
        self._attached += optimizers
        for optimizer in optimizers:
            self.watch(optimizer)

    @contextmanager
    def phase(
        self,
        name: str,
        freeze: PatternLike | Sequence[PatternLike] | None = None,
        optimizers: Sequence[HoldsParameters] | None = None,
        idle: PatternLike | Sequence[PatternLike] = (),
    ) -> Iterator[PhaseRecord]:
        """A phase as a `with` block; an exception inside it leaves it unproven.

        Args, Raises: as for `begin` and `end`.
        """
        record = self.begin(name, freeze, optimizers, idle)
        watch = self._open
        try:
            yield record
            if self._open is watch:  # not ended by hand
                self.end()
        finally:
            if self._open is watch:
                self.abandon()

    def begin(
        self,
        name: str,
        freeze: PatternLike | Sequence[PatternLike] | None = None,
        optimizers: Sequence[HoldsParameters] | None = None,
        idle: PatternLike | Sequence[PatternLike] = (),
    ) -> PhaseRecord:
        """Opens a phase: draws its contract and takes the fingerprints.

        Args:
            name: The phase's name in the report.
            freeze: Patterns of this phase, if they are others than the audit's.
            optimizers: Optimizers of this phase, if they are others than before; they stay for later phases.
            idle: Patterns of what is not frozen, and may stay as it is all the same.

        Raises:
            PatternError: A pattern cannot be read or selects nothing.
            ValueError: A frozen tensor has no bytes that can be read, the average has nothing of what is frozen, or a
                name in `also` is taken.
            AuditError: Under the policy `raise`, the contract is broken already.
            RuntimeError: Another phase is open.
        """
        if self._open is not None:
            raise RuntimeError(f"phase {self._open.record.name!r} is still open")
        if optimizers is not None:
            self._optimizers = _checked(optimizers)
        patterns = self._freeze if freeze is None else as_list(freeze)
        self._open = watch = PhaseWatch(name, self._subject, patterns, as_list(idle), self._optimizers)
        self._seen = set()
        self.report.phases.append(watch.record)
        try:
            for optimizer in self._optimizers:
                self._listen(optimizer)
            # A loop that never steps is seen by its backwards alone.
            if self._attached and (trained := watch.trained()):
                self._handles.append(register_multi_grad_hook(trained, lambda _: watch.note_backward(), mode="any"))
            self._settle(watch.at_begin())
        except BaseException:
            self.abandon()
            raise
        return watch.record

    def end(self) -> None:
        """Closes the phase: compares every byte, and asks whether what was meant to train did.

        Raises:
            AuditError: Under the policy `raise`, the contract is broken.
        """
        watch = self._watch()
        try:
            self._settle(watch.at_end())
            watch.record.completed = True
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Closes the phase, if one is open, with nothing proven: its record is not completed."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._open = [], None

    def after_backward(self) -> None:
        """Call between `backward()` and `step()`: no frozen tensor may have a gradient.

        Raises:
            AuditError: Under the policy `raise`, the contract is broken.
        """
        self._settle(self._watch().after_backward())

    def after_step(self) -> None:
        """Call after `step()`: counts the step, and looks at every frozen tensor's flags, identity and version.

        Raises:
            AuditError: Under the policy `raise`, the contract is broken.
        """
        self._settle(self._watch().after_step())

    def look_every(self, steps: int) -> None:
        """From now on in this phase, looks between steps at every so many only, if the frozen part is not run at all.

        Its bytes are compared whenever `verify` is called and when the phase ends, as ever.
        """
        self._watch().every = steps

    @property
    def holds(self) -> bool:
        """Whether a phase is open, and nothing was found in it so far."""
        return self._open is not None and self._open.record.ok

    def verify(self, bytes_only: bool = False) -> None:
        """Compares the bytes of every frozen tensor with those it began with, whatever the signs say.

        Called when a phase ends; call it before a checkpoint and a validation as well.

        Args:
            bytes_only: Whether not to look for modules and tensors that were added or replaced, too.

        Raises:
            AuditError: Under the policy `raise`, the contract is broken.
        """
        self._settle(self._watch().verify(bytes_only))

    def _listen(self, optimizer: HoldsParameters) -> None:
        """Has an optimizer tell of its steps, while the phase is open."""
        if not tells_of_steps(optimizer):
            return
        is_attached = any(each is optimizer for each in self._attached)
        if is_attached:
            self._handles.append(optimizer.register_step_pre_hook(lambda *_: self.after_backward()))
        self._handles.append(optimizer.register_step_post_hook(partial(self._note_step, is_attached)))

    def _note_step(self, is_attached: bool, optimizer: Optimizer, *_: Any) -> None:
        is_new = self._watch().note_step(optimizer)
        if is_attached:
            self._settle(self._watch().after_step(is_new))

    def _watch(self) -> PhaseWatch:
        if self._open is None:
            raise RuntimeError("no phase is open: the audit works inside `with audit.phase(name):`")
        return self._open

    def _settle(self, found: list[Violation]) -> None:
        """Records what has not been recorded in this phase, and does what the policy says."""
        watch = self._watch()
        if found and self._policy == "restore":
            watch.put_back()
        new = [violation for violation in found if (violation.kind, violation.name) not in self._seen]
        if not new:
            return
        self._seen |= {(violation.kind, violation.name) for violation in new}
        watch.record.violations.extend(new)
        if self._policy == "raise":
            raise AuditError(new)
        if self._policy == "warn":
            for violation in new:
                warnings.warn(str(violation), stacklevel=_depth_of_the_caller())


def attach(
    model: nn.Module,
    *optimizers: Optimizer,
    freeze: PatternLike | Sequence[PatternLike],
    policy: Policy = "raise",
    phase: str = "training",
) -> GradientAudit:
    """Audits a loop without an edit of it: looks at every step of these optimizers from now on.

    Returns:
        The audit, with an open phase: its `end()` compares every byte, and asks whether all that was to train did.

    Raises: as for `GradientAudit` and `begin`.
    """
    audit = GradientAudit(model, freeze, policy=policy)
    audit.attach(*optimizers)
    audit.begin(phase)
    return audit


def _checked(optimizers: Sequence[HoldsParameters]) -> list[HoldsParameters]:
    if hasattr(optimizers, "param_groups") or not all(hasattr(each, "param_groups") for each in optimizers):
        raise TypeError(f"expected a list of optimizers, each with param_groups, got {optimizers!r}")
    return list(optimizers)


def _depth_of_the_caller() -> int:
    """How many calls lie between a warning and the code that is not the audit's."""
    depth, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals["__name__"] in (__name__, "contextlib"):
        depth, frame = depth + 1, frame.f_back
    return depth
