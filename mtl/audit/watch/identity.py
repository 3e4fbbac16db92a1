"""Whether the tensors that were frozen are still the ones that hang in the model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mtl.audit.report import Finding
from mtl.audit.watch import causes
from mtl.audit.watch.contract import Contract
from mtl.audit.watch.findings import Findings
from mtl.audit.watch.frozen_tensor import Watched
from mtl.audit.watch.places import Place, is_readable
from mtl.runtime.fingerprint import fingerprint

# A plain attribute that has been the same tensor at so many looks is state, and no result of a forward.
_STAYS = 3


class Identity:
    """Tells what was replaced, what has come, and what is gone."""

    def __init__(self, watched: Sequence[Watched], findings: Findings) -> None:
        self._watched = watched
        self._findings = findings
        self._known = {each.place.name for each in watched}
        self._attributes = [each for each in watched if each.place.kind == "attr"]

    def compare(self, now: Contract) -> list[Finding]:
        """Holds a contract drawn by now against the phase's own."""
        there = {place.name: place for place in now.frozen}
        found = [finding for each in self._watched for finding in self.of(each, there.get(each.place.name))]
        # A cache that the first forward fills is no part of what was frozen.
        newcomers = [p for p in now.frozen if p.kind != "attr" and not p.is_passing and p.name not in self._known]
        detail = "was not there when the phase began"
        return found + [
            self._findings.violation("identity_changed", place, causes.of_addition(place), detail)
            for place in newcomers
        ]

    def of(self, watched: Watched, place: Place | None) -> list[Finding]:
        """Whether another tensor hangs by now where a frozen one hung; `place` is what has its name now."""
        current = None if place is None else place.look()
        # What a module remembers of its last forward is a new tensor each time; only parameters and buffers stay.
        if current is watched.tensor or watched.place.kind == "attr":
            return []
        detail = "is gone" if current is None else "is another tensor than when the phase began"
        if current is not None and watched.place.is_passing and not _is_rewritten(watched, current):
            return [self._findings.hazard("identity_changed", watched.place, causes.PASSING, detail)]
        is_same_module = place is not None and place.owner is watched.place.owner
        cause = causes.of_replacement(watched.place) if is_same_module else causes.REPLACED
        if current is None:
            cause = causes.of_removal(watched.place)
        return [self._findings.violation("identity_changed", watched.place, cause, detail)]

    def of_attributes(self) -> list[Finding]:
        """Plain attributes that were the same tensor for some steps, and are another one with other bytes now."""
        found: list[Finding] = []
        for watched in self._attributes:
            current = watched.place.look() if not watched.is_result else None
            if current is None or current is watched.tensor:
                watched.num_stays += current is not None
                continue
            was_state = watched.num_stays >= _STAYS and current.grad_fn is None and is_readable(current)
            if was_state and (current.shape, current.dtype) == (watched.tensor.shape, watched.tensor.dtype):
                if fingerprint(current) == watched.digest:
                    watched.follow(current)
                    continue
                cause = causes.REBOUND.format(owner=type(watched.place.owner).__name__)
                detail = "is another tensor with other bytes than when the phase began"
                found.append(self._findings.violation("attr_changed", watched.place, cause, detail))
            watched.is_result = True
        return found


def _is_rewritten(watched: Watched, current: Tensor) -> bool:
    """Whether a buffer was made again as the same kind of tensor with other bytes, which a cache would not be."""
    is_alike = (current.shape, current.dtype) == (watched.tensor.shape, watched.tensor.dtype)
    return is_alike and is_readable(current) and fingerprint(current) != watched.digest
