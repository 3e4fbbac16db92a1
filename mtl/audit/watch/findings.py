"""Builds the findings of one phase."""

from __future__ import annotations

from collections.abc import Sequence

from mtl.audit.report import Hazard, PhaseRecord, Violation
from mtl.audit.watch.contract import Contract
from mtl.audit.watch.places import TensorPlace
from mtl.audit.watch.ranks import RankDifference
from mtl.patterns import text_of


class FindingBuilder:
    """Builds findings with the phase's name and step, and with the pattern that froze the tensor."""

    def __init__(self, record: PhaseRecord, contract: Contract, written_at: Sequence[str]) -> None:
        """Args:
        record: The phase's record.
        contract: Its contract.
        written_at: File and line of each of its patterns, if they are known.
        """
        self._record = record
        self._patterns = contract.patterns
        self._pattern_of = contract.pattern_of
        self._written_at = written_at

    def add_patterns(self, contract: Contract) -> None:
        """Adds the patterns of tensors that were added since."""
        self._pattern_of = {**contract.pattern_of, **self._pattern_of}

    def violation(
        self,
        kind: str,
        place: TensorPlace,
        cause: str,
        detail: str,
        since: int | None = None,
        size: tuple[float, float] | None = None,
    ) -> Violation:
        """A violation at the present step; without `since`, it happened in this step.

        Args:
            kind: Its kind.
            place: The tensor's place.
            cause: The most likely cause.
            detail: What was observed.
            since: The last step after which it was known to be right.
            size: Of changed bytes, the largest absolute difference and the share of elements.
        """
        step, (max_abs, share) = self._record.num_steps, size or (None, None)
        since = step if since is None else since
        pattern = self._pattern_text(place)
        return Violation(kind, place.name, self._record.name, step, cause, detail, since, max_abs, share, pattern)

    def hazard(self, kind: str, place: TensorPlace, cause: str, detail: str) -> Hazard:
        """A hazard at the present step."""
        return self.module_hazard(kind, place.name, cause, detail, self._pattern_text(place))

    def module_hazard(self, kind: str, name: str, cause: str, detail: str, pattern: str | None = None) -> Hazard:
        """A hazard of a module at the present step."""
        step = self._record.num_steps
        return Hazard(kind, name, self._record.name, step, cause, detail, step, pattern=pattern)

    def ranks_differ(self, difference: RankDifference, since: int) -> Violation:
        """A tensor that differs between ranks at the present step, and did not after step `since`."""
        step, name = self._record.num_steps, difference.name
        what = ("ranks_differ", name, self._record.name, step, difference.cause, difference.detail, since)
        return Violation(*what, pattern=self._pattern_by_name(name))

    def _pattern_text(self, place: TensorPlace) -> str | None:
        return self._pattern_by_name(place.name.removeprefix("ema.") if place.is_copy else place.name)

    def _pattern_by_name(self, name: str) -> str | None:
        """The pattern that froze a tensor, with its file and line if known; None if it is not frozen."""
        index = self._pattern_of.get(name)
        if index is None:
            return None
        pattern = repr(text_of(self._patterns[index]))
        return f"{pattern} ({self._written_at[index]})" if index < len(self._written_at) else pattern
