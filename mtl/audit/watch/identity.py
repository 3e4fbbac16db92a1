"""Whether the frozen tensors are still the ones that are registered in the model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mtl.audit.report import Finding
from mtl.audit.watch import causes
from mtl.audit.watch.contract import Contract
from mtl.audit.watch.findings import FindingBuilder
from mtl.audit.watch.frozen_tensor import FrozenTensor
from mtl.audit.watch.places import TensorPlace, is_readable
from mtl.runtime.fingerprint import fingerprint

# A plain attribute that was the same tensor at this many checks is state, and no result of a forward.
_STAYS = 3


class Identity:
    """Finds frozen tensors that were replaced, added or removed."""

    def __init__(self, frozen: Sequence[FrozenTensor], findings: FindingBuilder) -> None:
        self._frozen = frozen
        self._findings = findings
        self._known = {each.place.name for each in frozen}
        self._attributes = [each for each in frozen if each.place.kind == "attr"]

    def compare(self, now: Contract) -> list[Finding]:
        """Compares the present contract with that of the phase's begin."""
        there = {place.name: place for place in now.frozen}
        found = [finding for each in self._frozen for finding in self.check(each, there.get(each.place.name))]
        # A cache that the first forward fills was not frozen.
        added = [p for p in now.frozen if p.kind != "attr" and not p.is_non_persistent and p.name not in self._known]
        detail = "was not there when the phase began"
        return found + [
            self._findings.violation("identity_changed", place, causes.of_addition(place), detail) for place in added
        ]

    def check(self, frozen: FrozenTensor, place: TensorPlace | None) -> list[Finding]:
        """Whether a frozen tensor was replaced or removed; `place` is the one with its name now."""
        current = None if place is None else place.current()
        # A plain attribute may be a result of the last forward, a new tensor each time.
        if current is frozen.tensor or frozen.place.kind == "attr":
            return []
        detail = "is gone" if current is None else "is another tensor than when the phase began"
        if current is not None and frozen.place.is_non_persistent and not _is_rewritten(frozen, current):
            return [self._findings.hazard("identity_changed", frozen.place, causes.RECOMPUTED, detail)]
        is_same_module = place is not None and place.owner is frozen.place.owner
        cause = causes.of_replacement(frozen.place) if is_same_module else causes.REPLACED
        if current is None:
            cause = causes.of_removal(frozen.place)
        return [self._findings.violation("identity_changed", frozen.place, cause, detail)]

    def check_attributes(self) -> list[Finding]:
        """Plain attributes that were the same tensor for some steps, and are another with other bytes now."""
        found: list[Finding] = []
        for frozen in self._attributes:
            current = frozen.place.current() if not frozen.is_result else None
            if current is None or current is frozen.tensor:
                frozen.num_stays += current is not None
                continue
            was_state = frozen.num_stays >= _STAYS and current.grad_fn is None and is_readable(current)
            if was_state and (current.shape, current.dtype) == (frozen.tensor.shape, frozen.tensor.dtype):
                if fingerprint(current) == frozen.digest:
                    frozen.rebind(current)
                    continue
                cause = causes.REBOUND.format(owner=type(frozen.place.owner).__name__)
                detail = "is another tensor with other bytes than when the phase began"
                found.append(self._findings.violation("attr_changed", frozen.place, cause, detail))
            frozen.is_result = True
        return found


def _is_rewritten(frozen: FrozenTensor, current: Tensor) -> bool:
    """Whether a buffer was replaced by one of the same shape and dtype with other bytes, unlike a recomputed cache."""
    is_alike = (current.shape, current.dtype) == (frozen.tensor.shape, frozen.tensor.dtype)
    return is_alike and is_readable(current) and fingerprint(current) != frozen.digest
