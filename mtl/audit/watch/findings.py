"""Makes findings of one phase: what was seen, in the terms of the report."""

from __future__ import annotations

from collections.abc import Sequence

from mtl.audit.report import Hazard, PhaseRecord, Violation
from mtl.audit.watch.contract import Contract
from mtl.audit.watch.places import Place
from mtl.patterns import text_of


class Findings:
    """Knows the phase's record, and which pattern froze what."""

    def __init__(self, record: PhaseRecord, contract: Contract, written_at: Sequence[str]) -> None:
        """Args:
        record: The phase's record.
        contract: Its contract.
        written_at: Where each of its patterns was written, if that is known.
        """
        self._record = record
        self._patterns = contract.patterns
        self._pattern_of = contract.pattern_of
        self._written_at = written_at

    def know(self, contract: Contract) -> None:
        """Learns what froze the names that have come since."""
        self._pattern_of = {**contract.pattern_of, **self._pattern_of}

    def violation(
        self,
        kind: str,
        place: Place,
        cause: str,
        detail: str,
        since: int | None = None,
        size: tuple[float, float] | None = None,
    ) -> Violation:
        """A violation as it is seen now; without `since`, it happened in this very step.

        Args:
            kind: Its kind.
            place: What it is about.
            cause: What most likely did it.
            detail: What was seen.
            since: The last step after which it was known to be right.
            size: Of changed bytes, the largest difference and the share of elements.
        """
        step, (max_abs, share) = self._record.num_steps, size or (None, None)
        since = step if since is None else since
        pattern = self.why_frozen(place)
        return Violation(kind, place.name, self._record.name, step, cause, detail, since, max_abs, share, pattern)

    def hazard(self, kind: str, place: Place, cause: str, detail: str) -> Hazard:
        """A hazard as it is seen now."""
        return self.hazard_of(kind, place.name, cause, detail, self.why_frozen(place))

    def hazard_of(self, kind: str, name: str, cause: str, detail: str, pattern: str | None = None) -> Hazard:
        """The same, of something that is no tensor."""
        step = self._record.num_steps
        return Hazard(kind, name, self._record.name, step, cause, detail, step, pattern=pattern)

    def why_frozen(self, place: Place) -> str | None:
        """The pattern that froze something, and where it was written; None of what is not frozen."""
        index = self._pattern_of.get(place.name.removeprefix("ema.") if place.is_copy else place.name)
        if index is None:
            return None
        pattern = repr(text_of(self._patterns[index]))
        return f"{pattern} ({self._written_at[index]})" if index < len(self._written_at) else pattern
