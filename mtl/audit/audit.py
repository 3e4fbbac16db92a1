"""`GradientAudit`: the contract of each phase, checked between steps and proven at its end."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from mtl.audit.causes import cause_of_change
from mtl.audit.contract import Contract, Place, draw_contract, shared_storage
from mtl.audit.fingerprint import fingerprint, root
from mtl.audit.report import AuditError, PhaseRecord, Report, Violation

Policy = Literal["raise", "warn", "collect"]

_STALE_GRADIENT = "a gradient left from before the freeze; set grad = None when freezing"


class HoldsParameters(Protocol):
    """Anything that steps parameters: a torch optimizer, or a balancing method that updates its own."""

    param_groups: list[dict[str, Any]]


@dataclass
class _Watched:
    """A frozen tensor as it was when the phase began."""

    place: Place
    tensor: Tensor
    address: int
    version: int
    digest: str


class GradientAudit:
    """Proves that frozen tensors stay bit-identical and receive no gradient.

    Between steps it looks at cheap signs (tripwires), with no host sync on a GPU; whenever it is asked to `verify`, and
    when a phase ends, it compares the bytes of every frozen tensor. A tensor's version counter makes it look at the
    bytes at once, but is never itself a verdict.
    """

    def __init__(
        self,
        model: nn.Module,
        freeze: Sequence[str] = (),
        optimizers: Sequence[HoldsParameters] = (),
        policy: Policy = "raise",
    ) -> None:
        """Args:
            model: The module whose tensors are watched.
            freeze: Patterns (see `mtl.patterns`) of what must not move; `phase` may name others.
            optimizers: Every optimizer that steps parameters of the model.
            policy: What a violation does: raise `AuditError`, warn and go on, or only collect.

        Raises:
            ValueError: The policy is none of these.
        """
        if policy not in ("raise", "warn", "collect"):
            raise ValueError(f"expected the policy raise, warn or collect, got {policy!r}")
        self.report = Report()
        self._model = model
        self._freeze = list(freeze)
        self._optimizers = list(optimizers)
        self._policy = policy
        self._record: PhaseRecord | None = None
        self._contract = Contract((), [], [])
        self._watched: list[_Watched] = []
        self._frozen_norms: list[tuple[str, nn.Module]] = []
        self._seen: set[tuple[str, str]] = set()
        self._membership: tuple[tuple[int, int], ...] = ()

    def watch(self, optimizer: HoldsParameters) -> None:
        """Adds an optimizer that was built after the audit."""
        self._optimizers.append(optimizer)

    @contextmanager
    def phase(
        self, name: str, freeze: Sequence[str] | None = None, optimizers: Sequence[HoldsParameters] | None = None
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
        self._begin(name, self._freeze if freeze is None else list(freeze))
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
                cause = _STALE_GRADIENT
                if watched.tensor.requires_grad:
                    cause = "it required a gradient when the loss was computed; enforce the freeze before the forward"
                found.append(self._violation("grad_present", watched.place, cause, "has a gradient"))
        found += self._train_mode()
        self._settle(found)

    def after_step(self) -> None:
        """Call after `step()`: counts the step, and looks at every frozen tensor's flags, identity and version.

        Raises:
            AuditError: Under the policy `raise`, the contract is broken.
        """
        record, found = self._open(), []
        record.num_steps += 1
        record.num_tripwire_checks += len(self._watched) + len(self._frozen_norms)
        for watched in self._watched:
            found += self._look_at(watched)
        found += self._train_mode() + self._optimizer_membership()
        self._settle(found)

    def verify(self) -> None:
        """Compares the bytes of every frozen tensor with those it began with, whatever the signs say.

        Called when a phase ends; call it before a checkpoint and a validation as well.

        Raises:
            AuditError: Under the policy `raise`, the contract is broken.
        """
        found = []
        for watched in self._watched:
            found += self._look_at(watched, compare=True)
        found += self._train_mode() + self._optimizer_membership()
        self._settle(found)

    def _begin(self, name: str, freeze: list[str]) -> None:
        self._contract = draw_contract(self._model, freeze)
        self._watched = [
            _Watched(place, tensor, tensor.data_ptr(), tensor._version, fingerprint(tensor))
            for place in self._contract.frozen
            if (tensor := place.look()) is not None
        ]
        buffers_of = {id(place.owner): place for place in self._contract.frozen if place.kind == "buffer"}
        self._frozen_norms = [
            (place.name.rpartition(".")[0], place.owner)
            for place in buffers_of.values()
            if isinstance(place.owner, _NormBase)
        ]
        self._seen = set()
        self._membership = ()
        digests = {watched.place.name: watched.digest for watched in self._watched}
        free = [place for place in self._contract.free if place.kind == "param"]
        self._free_digests = {place.name: fingerprint(tensor) for place in free if (tensor := place.look()) is not None}
        self._record = PhaseRecord(name, freeze, digests, root(digests), num_trainable=len(free))
        self.report.phases.append(self._record)

    def _open(self) -> PhaseRecord:
        if self._record is None:
            raise RuntimeError("no phase is open: the audit works inside `with audit.phase(name):`")
        return self._record

    def _check_contract(self) -> None:
        """What can be wrong before the first step."""
        found = [
            self._violation(
                "shared_storage",
                frozen,
                "a tied or viewed tensor; freeze both names or neither",
                f"lies in the same memory as {free.name}, which is not frozen",
            )
            for frozen, free in shared_storage(self._contract)
        ]
        for watched in self._watched:
            found += self._look_at(watched)
            if watched.tensor.grad is not None:
                detail = "has a gradient before the first step"
                found.append(self._violation("grad_present", watched.place, _STALE_GRADIENT, detail))
        self._settle(found + self._optimizer_membership())

    def _look_at(self, watched: _Watched, compare: bool = False) -> list[Violation]:
        """One frozen tensor: is it still there, does it ask for no gradient, has it been written to."""
        place, tensor = watched.place, watched.tensor
        current = place.look()
        if current is not tensor:
            detail = "is gone" if current is None else "is another tensor than when the phase began"
            return [
                self._violation("identity_changed", place, "the module or tensor was replaced after the freeze", detail)
            ]
        found = []
        if tensor.requires_grad:
            cause = "requires_grad was not switched off, or was switched on again after the freeze"
            found.append(self._violation("requires_grad", place, cause, "requires a gradient"))
        if tensor.data_ptr() != watched.address or tensor._version != watched.version:
            compare = True
        if compare:
            self._open().num_fingerprint_checks += 1
            watched.address, watched.version = tensor.data_ptr(), tensor._version
            digest = fingerprint(tensor)
            if digest != watched.digest:
                cause = cause_of_change(place, tensor, self._param_groups())
                found.append(
                    self._violation(f"{place.kind}_changed", place, cause, "its bytes differ from the first ones")
                )
        return found

    def _train_mode(self) -> list[Violation]:
        cause = "a .train() after the freeze; keep the frozen module in eval mode"
        phase = self._open()
        return [
            Violation("train_mode", name, phase.name, phase.num_steps, cause, f"{type(norm).__name__} is in train mode")
            for name, norm in self._frozen_norms
            if norm.training
        ]

    def _optimizer_membership(self) -> list[Violation]:
        """Frozen tensors in an optimizer, trainable ones in none; looked at again when an optimizer's groups change."""
        groups = [group["params"] for group in self._param_groups()]
        membership = tuple((id(params), len(params)) for params in groups)
        if membership == self._membership:
            return []
        self._membership = membership
        held = {id(parameter) for params in groups for parameter in params}
        found = [
            self._violation(
                "in_optimizer",
                watched.place,
                "the optimizer was built before the freeze; build it from what trains only",
                "is held by an optimizer, whose decay or momentum could move it",
            )
            for watched in self._watched
            if id(watched.tensor) in held
        ]
        if not self._optimizers:
            return found
        return found + [
            self._violation(
                "not_in_optimizer",
                place,
                "thawed after the optimizer was built; rebuild the optimizer when a phase begins",
                "is not frozen and requires a gradient, but no watched optimizer holds it",
            )
            for place in self._contract.free
            if place.kind == "param" and (p := place.look()) is not None and p.requires_grad and id(p) not in held
        ]

    def _param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    def _count_trained(self) -> int:
        now = {place.name: place.look() for place in self._contract.free if place.kind == "param"}
        return sum(
            tensor is not None and fingerprint(tensor) != self._free_digests[name] for name, tensor in now.items()
        )

    def _violation(self, kind: str, place: Place, cause: str, detail: str) -> Violation:
        phase = self._open()
        return Violation(kind, place.name, phase.name, phase.num_steps, cause, detail)

    def _settle(self, found: list[Violation]) -> None:
        """Records what has not been recorded in this phase, and does what the policy says."""
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
