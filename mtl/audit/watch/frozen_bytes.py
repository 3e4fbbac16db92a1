"""The bytes of the frozen tensors of one phase: read in turn or all at once, and compared with the first ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mtl.audit.offline.difference import size_of_change
from mtl.audit.report import Finding, PhaseRecord
from mtl.audit.watch import causes
from mtl.audit.watch.findings import Findings
from mtl.audit.watch.frozen_tensor import Watched
from mtl.audit.watch.membership import HoldsParameters, param_groups
from mtl.audit.watch.places import is_sparse
from mtl.audit.watch.readings import Rotation
from mtl.runtime.fingerprint import fingerprint

_DETAIL = "its bytes differ from the first ones"


class ByteWatch:
    """Compares the bytes of frozen tensors with those of the phase's begin, and counts that in the phase's record."""

    def __init__(
        self,
        watched: Sequence[Watched],
        record: PhaseRecord,
        optimizers: Sequence[HoldsParameters],
        findings: Findings,
    ) -> None:
        """Args:
        watched: The frozen tensors.
        record: The phase's record.
        optimizers: The optimizers, for the cause of a change; the list may grow.
        findings: Makes findings.
        """
        self._findings = findings
        self._watched = watched
        self._record = record
        self._optimizers = optimizers
        self._rotation = Rotation(watched)
        self._verified_at: int | None = None

    def look(self, tripped: Sequence[Watched]) -> list[Finding]:
        """After a step: asks for what has its turn, and for what is suspected; compares what has come.

        Args:
            tripped: Tensors that may show a sign of a write.
        """
        found = self._ask(tripped)
        self._rotation.turn(self._record.num_steps)
        return found + self._changes(wait=False)

    def look_at(self, tripped: Sequence[Watched]) -> list[Finding]:
        """Between two steps: reads the bytes of tensors that show a sign of a write, and of all in the same modules."""
        if not any(watched.shows_a_sign() for watched in tripped):
            return []
        return self._ask(tripped) + self._changes(wait=False)

    def _ask(self, tripped: Sequence[Watched]) -> list[Finding]:
        """Asks for the bytes of what shows a sign; what was asked for before is compared if something has moved."""
        # BatchNorm's statistics move without a sign, its counter does not: the whole module is suspected.
        owners = {id(watched.place.owner) for watched in tripped if watched.shows_a_sign()}
        suspects = [watched for watched in self._watched if id(watched.place.owner) in owners] if owners else []
        found: list[Finding] = []
        if any(watched.was_moved() for watched in suspects):
            found = self.settle()
            self.restart()
        for watched in suspects:
            self._rotation.ask(watched, self._record.num_steps)
        return found

    def settle(self) -> list[Finding]:
        """Waits for what was asked for, and compares it."""
        return self._changes(wait=True)

    def verify(self, counted: bool) -> list[Finding]:
        """Every byte, whatever the signs say; one that is not `counted` leaves no trace where nothing is wrong."""
        self._verified_at = self._record.num_steps
        if counted:
            for watched in self._watched:
                self._rotation.ask(watched, self._record.num_steps)
            return self.settle()
        found = self.settle()
        for watched in self._watched:
            content = watched.part().detach().to("cpu")
            if fingerprint(content) == watched.digest:
                watched.known_at = self._record.num_steps
            elif watched.place.look() is watched.tensor:
                found.append(self._changed(watched, content))
        return found

    def restart(self) -> None:
        """Begins the turns anew; the tensors may lie elsewhere in memory."""
        self._rotation.pass_on()
        self._rotation = Rotation(self._watched)

    def state(self) -> dict[str, Any]:
        """What is known of the bytes, as plain data, once all that was asked for has been settled."""
        self._rotation.pass_on()
        return {
            "watched": {watched.place.name: watched.state() for watched in self._watched},
            "rotation": self._rotation.state(),
            "verified_at": self._verified_at,
        }

    def go_on(self, state: Mapping[str, Any]) -> list[Finding]:
        """Goes on in another process, with the bytes that are there now; the record has been taken over already."""
        found: list[Finding] = []
        # What the turns have read may have been written to behind the step.
        was_verified = state["verified_at"] == self._record.num_steps
        cause = causes.WHILE_STOPPED if was_verified else causes.WHILE_STOPPED_OR_BEFORE
        for watched in self._watched:
            name, first = watched.place.name, self._record.fingerprints[watched.place.name]
            is_first = watched.whole_digest == first
            watched.take_over(state["watched"][name], watched.digest if is_first else first)
            if not is_first:
                kind = f"{watched.place.kind}_changed"
                found.append(self._findings.violation(kind, watched.place, cause, _DETAIL, since=watched.known_at))
        self._rotation.take_over(state["rotation"])
        self._verified_at = self._record.num_steps
        return found

    def _changes(self, wait: bool) -> list[Finding]:
        """Compares the bytes that have come with the first ones."""
        found: list[Finding] = []
        for watched, content, step in self._rotation.arrived(wait):
            self._record.num_fingerprint_checks += 1
            if watched.is_original(content, step):
                # A sign that proved harmless is none the next time.
                watched.note_signs()
            elif watched.place.look() is watched.tensor:
                self._rotation.pass_on()
                found.append(self._changed(watched, content))
                watched.note_signs()
        return found

    def _changed(self, watched: Watched, content: Tensor) -> Finding:
        if watched.place.is_copy:
            cause = causes.of_copy(self._has_changed(watched.place.name.removeprefix("ema.")))
        else:
            cause = causes.of_change(watched, content, param_groups(self._optimizers))
        size = None
        is_alike = content.shape == watched.original.shape and not is_sparse(watched.tensor)
        if is_alike and content.dtype == watched.original.dtype:
            change = size_of_change(watched.original, content)
            size = change.max_abs, change.share
        kind = f"{watched.place.kind}_changed"
        return self._findings.violation(kind, watched.place, cause, _DETAIL, since=watched.proven_at, size=size)

    def _has_changed(self, name: str) -> bool:
        """Whether a frozen tensor of this name has other bytes than at first."""
        return any(
            watched.place.name == name and fingerprint(watched.part()) != watched.digest for watched in self._watched
        )
