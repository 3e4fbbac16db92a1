"""`GradientAudit`: the contract of each phase, checked between steps and proven at its end."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from mtl.audit import causes
from mtl.audit.contract import Contract, Place, draw_contract, shared_memory
from mtl.audit.fingerprint import fingerprint, root
from mtl.audit.membership import HoldsParameters, Membership
from mtl.audit.report import AuditError, PhaseRecord, Report, Violation
from mtl.audit.watched import Watched
from mtl.moduletree import unwrap
from mtl.patterns import PatternError, PatternLike, as_list

Policy = Literal["raise", "warn", "collect", "restore"]


class GradientAudit:
    """Proves that frozen tensors stay bit-identical and receive no gradient.

    Between steps it looks at cheap signs (tripwires), with no host sync on a GPU; whenever it is asked to `verify`, and
    when a phase ends, it compares the bytes of every frozen tensor. A tensor's version counter makes it look at the
    bytes at once, but is never itself a verdict. What happens between two phases is not watched.
    """

    def __init__(
        self,
        model: nn.Module,
        freeze: PatternLike | Sequence[PatternLike] = (),
        optimizers: Sequence[HoldsParameters] = (),
        policy: Policy = "raise",
    ) -> None:
        """Args:
            model: The module whose tensors are watched; of a wrapper (DDP, torch.compile), the module inside it.
            freeze: Patterns (see `mtl.patterns`) of what must not move; `phase` may name others.
            optimizers: Every optimizer that steps parameters of the model.
            policy: What a violation does: raise `AuditError`, warn and go on, only collect, or restore: put the frozen
                bits, flags and modes back and go on, for which a copy of every frozen tensor is kept.

        Raises:
            ValueError: The policy is none of these.
        """
        if policy not in get_args(Policy):
            raise ValueError(f"expected the policy raise, warn, collect or restore, got {policy!r}")
        self.report = Report()
        self._model = unwrap(model)
        self._freeze = as_list(freeze)
        self._optimizers = list(optimizers)
        self._policy = policy
        self._record: PhaseRecord | None = None
        self._contract = Contract((), [], [], [])
        self._membership = Membership([], [])
        self._watched: list[Watched] = []
        self._free_digests: dict[str, str] = {}
        self._frozen_norms: list[tuple[str, nn.Module]] = []
        self._seen: set[tuple[str, str]] = set()

    def watch(self, optimizer: HoldsParameters) -> None:
        """Adds an optimizer that was built after the audit."""
        self._optimizers.append(optimizer)

    def attach(self, *optimizers: Optimizer) -> None:
        """Looks at every step of these optimizers by itself: a loop then needs nothing of the audit but `phase`.

        The first optimizer's steps are the ones that are counted. Steps outside a phase are not looked at.
        """
        for number, optimizer in enumerate(optimizers):
            self.watch(optimizer)
            optimizer.register_step_pre_hook(self._before_step)
            if number == 0:
                optimizer.register_step_post_hook(self._behind_step)

    def _before_step(self, *_: object) -> None:
        if self._record is not None:
            self.after_backward()

    def _behind_step(self, *_: object) -> None:
        if self._record is not None:
            self.after_step()

    @contextmanager
    def phase(
        self,
        name: str,
        freeze: PatternLike | Sequence[PatternLike] | None = None,
        optimizers: Sequence[HoldsParameters] | None = None,
    ) -> Iterator[PhaseRecord]:
        """Opens a phase: draws its contract and fingerprints it; at the end compares every byte.

        Args:
            name: The phase's name in the report.
            freeze: Patterns of this phase, if they are others than the audit's.
            optimizers: Optimizers of this phase, if they are others than before; they stay for later phases.

        Raises:
            PatternError: A pattern cannot be read or selects nothing.
            AuditError: Under the policy `raise`, the contract is broken, at the beginning or at the end.
            RuntimeError: Another phase is open.
        """
        if self._record is not None:
            raise RuntimeError(f"phase {self._record.name!r} is still open")
        if optimizers is not None:
            self._optimizers = list(optimizers)
        self._begin(name, self._freeze if freeze is None else as_list(freeze))
        record = self._open()
        try:
            self._check_contract()
            yield record
            self.verify()
            record.num_trained = self._count_trained()
            record.completed = True
        finally:
            self._record = None

    def after_backward(self) -> None:
        """Call between `backward()` and `step()`: no frozen tensor may have a gradient.

        Raises:
            AuditError: Under the policy `raise`, the contract is broken.
        """
        record, found = self._open(), []
        record.num_tripwire_checks += len(self._watched) + len(self._frozen_norms)
        for watched in self._watched:
            if watched.tensor.grad is not None:
                cause = causes.LATE_FREEZE if watched.tensor.requires_grad else causes.STALE_GRADIENT
                found.append(self._violation("grad_present", watched.place, cause, "has a gradient"))
        self._settle(found + self._train_mode())

    def after_step(self) -> None:
        """Call after `step()`: counts the step, and looks at every frozen tensor's flags, identity and version.

        Raises:
            AuditError: Under the policy `raise`, the contract is broken.
        """
        record, found = self._open(), []
        record.num_steps += 1
        record.num_tripwire_checks += len(self._watched) + len(self._frozen_norms)
        unlinked = self._contract.is_unlinked()
        suspects = {id(watched.place.owner) for watched in self._watched if watched.shows_a_sign()}
        for watched in self._watched:
            # A sign on one tensor puts all of its module under suspicion: BatchNorm's statistics move without a sign,
            # its counter does not.
            found += self._look_at(watched, unlinked, compare=id(watched.place.owner) in suspects)
        self._settle(found + self._train_mode() + self._optimizer_membership())

    def verify(self) -> None:
        """Compares the bytes of every frozen tensor with those it began with, whatever the signs say.

        Called when a phase ends; call it before a checkpoint and a validation as well.

        Raises:
            AuditError: Under the policy `raise`, the contract is broken.
        """
        found = self._newcomers()
        for watched in self._watched:
            found += self._look_at(watched, unlinked=True, compare=True)
        self._settle(found + self._train_mode() + self._optimizer_membership())

    def _begin(self, name: str, freeze: list[PatternLike]) -> None:
        self._contract = draw_contract(self._model, freeze)
        self._membership = Membership(self._contract.frozen, self._contract.free)
        self._watched = [
            Watched(place, tensor, keep=self._policy == "restore")
            for place in self._contract.frozen
            if (tensor := place.look()) is not None
        ]
        norms = {
            id(place.owner): (place.module_name, place.owner)
            for place in self._contract.frozen
            if place.kind == "buffer" and isinstance(place.owner, _NormBase)
        }
        self._frozen_norms = list(norms.values())
        self._seen = set()
        self._free_digests = self._fingerprint_free()
        digests = {watched.place.name: watched.digest for watched in self._watched}
        self._record = PhaseRecord(
            name, list(self._contract.patterns), digests, root(digests), num_trainable=len(self._free_digests)
        )
        self.report.phases.append(self._record)

    def _open(self) -> PhaseRecord:
        if self._record is None:
            raise RuntimeError("no phase is open: the audit works inside `with audit.phase(name):`")
        return self._record

    def _check_contract(self) -> None:
        """What can be wrong before the first step."""
        found = []
        for frozen, free in shared_memory(self._contract):
            detail = f"lies in the same memory as {free.name}, which is not frozen"
            found.append(self._violation("shared_storage", frozen, causes.SHARED, detail))
        for watched in self._watched:
            found += self._look_at(watched, unlinked=False, compare=False)
            if watched.tensor.grad is not None:
                detail = "has a gradient before the first step"
                found.append(self._violation("grad_present", watched.place, causes.STALE_GRADIENT, detail))
        self._settle(found + self._optimizer_membership())

    def _look_at(self, watched: Watched, unlinked: bool, compare: bool) -> list[Violation]:
        """One frozen tensor: is it still there, does it ask for no gradient, does it have the bytes it began with."""
        place, tensor = watched.place, watched.tensor
        current = place.look_from(self._model) if unlinked else place.look()
        if current is not tensor:
            # What a module remembers of its last forward is a new tensor each time; only parameters and buffers stay.
            if place.kind == "attr":
                return []
            detail = "is gone" if current is None else "is another tensor than when the phase began"
            return [self._violation("identity_changed", place, causes.REPLACED, detail)]
        found = []
        if tensor.requires_grad:
            found.append(self._violation("requires_grad", place, causes.STILL_REQUIRED, "requires a gradient"))
        if compare:
            self._open().num_fingerprint_checks += 1
            if watched.has_changed():
                groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
                cause = causes.of_change(place, tensor, groups)
                detail = "its bytes differ from the first ones"
                found.append(self._violation(f"{place.kind}_changed", place, cause, detail))
        return found

    def _newcomers(self) -> list[Violation]:
        """Parameters and buffers that now hang behind the line and were not there when the phase began."""
        try:
            now = draw_contract(self._model, self._contract.patterns)
        except PatternError:
            return []  # nothing of what was frozen is left; each tensor is found to be gone
        known = {place.name for place in self._contract.frozen}
        self._membership = Membership(self._contract.frozen, now.free)
        detail = "was not there when the phase began"
        return [
            self._violation("identity_changed", place, causes.REPLACED, detail)
            for place in now.frozen
            if place.kind != "attr" and place.name not in known
        ]

    def _train_mode(self) -> list[Violation]:
        phase = self._open()
        training = [(name, type(norm).__name__) for name, norm in self._frozen_norms if norm.training]
        return [
            Violation("train_mode", name, phase.name, phase.num_steps, causes.TRAIN_MODE, f"{kind} is in train mode")
            for name, kind in training
        ]

    def _optimizer_membership(self) -> list[Violation]:
        explained = {
            "in_optimizer": (causes.EARLY_OPTIMIZER, "is held by an optimizer, whose decay or momentum could move it"),
            "not_in_optimizer": (causes.LATE_THAW, "is not frozen and requires a gradient, but no optimizer holds it"),
        }
        breaches = self._membership.look(self._optimizers)
        return [self._violation(kind, place, *explained[kind]) for kind, place in breaches]

    def _fingerprint_free(self) -> dict[str, str]:
        """Fingerprints of the parameters outside the contract."""
        free = [place for place in self._contract.free if place.kind == "param"]
        return {place.name: fingerprint(tensor) for place in free if (tensor := place.look()) is not None}

    def _count_trained(self) -> int:
        now = self._fingerprint_free()
        return sum(now.get(name) != digest for name, digest in self._free_digests.items())

    def _violation(self, kind: str, place: Place, cause: str, detail: str) -> Violation:
        phase = self._open()
        return Violation(kind, place.name, phase.name, phase.num_steps, cause, detail)

    def _settle(self, found: list[Violation]) -> None:
        """Records what has not been recorded in this phase, and does what the policy says."""
        if found and self._policy == "restore":
            self._restore()
        new = [violation for violation in found if (violation.kind, violation.name) not in self._seen]
        if not new:
            return
        self._seen |= {(violation.kind, violation.name) for violation in new}
        self._open().violations.extend(new)
        if self._policy == "raise":
            raise AuditError(new)
        if self._policy == "warn":
            for violation in new:
                warnings.warn(str(violation), stacklevel=3)

    def _restore(self) -> None:
        """Puts back what can be put back: bits, flags and modes; a tensor that was replaced is only reported."""
        for watched in self._watched:
            watched.put_back()
        for _, norm in self._frozen_norms:
            norm.eval()
