"""Compares the bytes of a phase's frozen tensors with the original ones, in rotation or all at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mtl.audit.report import Finding, PhaseRecord
from mtl.audit.watch import causes
from mtl.audit.watch.change_causes import cause_of_change
from mtl.audit.watch.change_size import size_of_change
from mtl.audit.watch.findings import FindingBuilder
from mtl.audit.watch.frozen_tensor import FrozenTensor
from mtl.audit.watch.optimizers import HoldsParameters, param_groups
from mtl.audit.watch.places import is_sparse
from mtl.audit.watch.readings import RotatingReader
from mtl.runtime.fingerprint import fingerprint

_DETAIL = "its bytes differ from the original ones"


class ByteWatch:
    """Compares the bytes of frozen tensors with those of the phase's begin, and counts this in the phase's record.

    Attributes:
        verified_at: The last step after which all of them were compared; None before the first.
    """

    def __init__(
        self,
        frozen: Sequence[FrozenTensor],
        record: PhaseRecord,
        optimizers: Sequence[HoldsParameters],
        findings: FindingBuilder,
    ) -> None:
        """Args:
        frozen: The frozen tensors.
        record: The phase's record.
        optimizers: The optimizers, for the cause of a change; the list may grow.
        findings: Builds findings.
        """
        self._findings = findings
        self._frozen = frozen
        self._record = record
        self._optimizers = optimizers
        self._reader = RotatingReader(frozen)
        self.verified_at: int | None = None

    def after_step(self, tripped: Sequence[FrozenTensor]) -> list[Finding]:
        """Requests the bytes that are due and those of suspects; compares those that have arrived.

        Args:
            tripped: Tensors that may have been written.
        """
        found = self._request(tripped)
        self._reader.advance(self._record.num_steps)
        return found + self._compare_arrived(wait=False)

    def check_suspects(self, tripped: Sequence[FrozenTensor]) -> list[Finding]:
        """Between two steps: reads the bytes of tensors that may be written, and of all in the same modules."""
        if not any(frozen.may_be_written() for frozen in tripped):
            return []
        return self._request(tripped) + self._compare_arrived(wait=False)

    def _request(self, tripped: Sequence[FrozenTensor]) -> list[Finding]:
        """Requests the bytes of suspects; earlier requests are compared first if a suspect has another address."""
        # BatchNorm's statistics change without a new version, its counter does not: all of the module is suspected.
        owners = {id(frozen.place.owner) for frozen in tripped if frozen.may_be_written()}
        suspects = [frozen for frozen in self._frozen if id(frozen.place.owner) in owners] if owners else []
        found: list[Finding] = []
        if any(frozen.was_moved() for frozen in suspects):
            found = self.finish_reads()
            self.restart()
        for frozen in suspects:
            self._reader.request(frozen, self._record.num_steps)
        return found

    def finish_reads(self) -> list[Finding]:
        """Waits for pending reads, and compares them."""
        return self._compare_arrived(wait=True)

    def verify(self, counted: bool) -> list[Finding]:
        """Compares every byte; if not `counted`, a check that passes leaves no trace in the report."""
        self.verified_at = self._record.num_steps
        if counted:
            for frozen in self._frozen:
                self._reader.request(frozen, self._record.num_steps)
            return self.finish_reads()
        found = self.finish_reads()
        for frozen in self._frozen:
            content = frozen.part().detach().to("cpu")
            if fingerprint(content) == frozen.digest:
                frozen.known_at = self._record.num_steps
            elif frozen.place.current() is frozen.tensor:
                found.append(self._violation(frozen, content))
        return found

    def restart(self) -> None:
        """Restarts the rotation; tensors may have other addresses."""
        self._reader.update_members()
        self._reader = RotatingReader(self._frozen)

    def state_dict(self) -> dict[str, Any]:
        """The state as plain data; call `finish_reads` first."""
        self._reader.update_members()
        return {
            "watched": {frozen.place.name: frozen.state_dict() for frozen in self._frozen},
            "rotation": self._reader.state_dict(),
            "verified_at": self.verified_at,
        }

    def resume(self, state: Mapping[str, Any]) -> list[Finding]:
        """Resumes in another process, with the bytes that are there now; the record was loaded before."""
        found: list[Finding] = []
        # Bytes that were read in rotation may have been written after the step.
        was_verified = state["verified_at"] == self._record.num_steps
        cause = causes.WHILE_STOPPED if was_verified else causes.WHILE_STOPPED_OR_BEFORE
        for frozen in self._frozen:
            name, original = frozen.place.name, self._record.fingerprints[frozen.place.name]
            is_same = frozen.full_digest == original
            frozen.load_state_dict(state["watched"][name], frozen.digest if is_same else original)
            if not is_same:
                kind = f"{frozen.place.kind}_changed"
                found.append(self._findings.violation(kind, frozen.place, cause, _DETAIL, since=frozen.known_at))
        self._reader.load_state_dict(state["rotation"])
        self.verified_at = self._record.num_steps
        return found

    def _compare_arrived(self, wait: bool) -> list[Finding]:
        """Compares the bytes that have arrived with the original ones."""
        found: list[Finding] = []
        for frozen, content, step in self._reader.arrived(wait):
            self._record.num_fingerprint_checks += 1
            if frozen.is_original(content, step):
                # Another version of the same bytes is harmless.
                frozen.record_version()
            elif frozen.place.current() is frozen.tensor:
                self._reader.update_members()
                found.append(self._violation(frozen, content))
                frozen.record_version()
        return found

    def _violation(self, frozen: FrozenTensor, content: Tensor) -> Finding:
        if frozen.place.is_copy:
            cause = causes.of_copy(self._has_changed(frozen.place.name.removeprefix("ema.")))
        else:
            cause = cause_of_change(frozen, content, param_groups(self._optimizers))
        size = None
        is_alike = content.shape == frozen.original.shape and not is_sparse(frozen.tensor)
        if is_alike and content.dtype == frozen.original.dtype:
            change = size_of_change(frozen.original, content)
            size = change.max_abs, change.share
        kind = f"{frozen.place.kind}_changed"
        return self._findings.violation(kind, frozen.place, cause, _DETAIL, since=frozen.proven_at, size=size)

    def _has_changed(self, name: str) -> bool:
        """Whether the bytes of the frozen tensor of this name differ from the original ones."""
        return any(frozen.place.name == name and fingerprint(frozen.part()) != frozen.digest for frozen in self._frozen)
