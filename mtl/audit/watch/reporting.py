"""What becomes of findings: recorded once in each phase, and then raised, warned of, or mended."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Literal

from mtl.audit.report import AuditError, Finding, Hazard, PhaseRecord, Violation, grouped
from mtl.audit.watch.stack import depth_outside

Policy = Literal["raise", "warn", "collect", "restore"]
# The module whose callers are blamed for a warning.
_AUDIT = "mtl.audit.audit"


class Reporter:
    """Records findings, and does what the policy says."""

    def __init__(self, policy: Policy, strict: bool) -> None:
        """Args: as `GradientAudit` has them."""
        self._policy = policy
        self._strict = strict
        self._recorded: set[tuple[type[Finding], str, str]] = set()
        self._warned: set[tuple[str, str]] = set()

    def begin(self, record: PhaseRecord) -> None:
        """A phase begins, or continues: what was recorded before it was stopped is not recorded again."""
        self._recorded = {_key(each) for each in (*record.violations, *record.hazards)}

    def settle(self, record: PhaseRecord, found: Iterable[Finding], put_back: Callable[[], None]) -> None:
        """Records what has not been recorded in this phase.

        Args:
            record: The phase's record.
            found: What was found; under `strict`, hazards are violations.
            put_back: Gives what is frozen its bits back; called under `restore`.

        Raises:
            AuditError: Under the policy `raise`, there is a violation.
        """
        told = [Violation(**asdict(each)) if self._strict and isinstance(each, Hazard) else each for each in found]
        if self._policy == "restore" and any(isinstance(each, Violation) for each in told):
            put_back()
        new = [each for each in told if _key(each) not in self._recorded]
        self._recorded |= {_key(each) for each in new}
        hazards = [each for each in new if isinstance(each, Hazard)]
        violations = [each for each in new if isinstance(each, Violation)]
        record.hazards.extend(hazards)
        record.violations.extend(violations)
        self._warn_of(hazards)
        if violations and self._policy == "raise":
            raise AuditError(violations)
        if self._policy == "warn":
            for violation in violations:
                warnings.warn(str(violation), stacklevel=depth_outside(__name__, _AUDIT))

    def _warn_of(self, hazards: Sequence[Hazard]) -> None:
        """Warns of each hazard once, whatever the number of phases that have it."""
        new = [each for each in hazards if (each.kind, each.name) not in self._warned]
        self._warned |= {(each.kind, each.name) for each in new}
        if self._policy != "collect":
            for line in grouped(new):
                warnings.warn(f"hazard: {line}", stacklevel=depth_outside(__name__, _AUDIT))


def _key(finding: Finding) -> tuple[type[Finding], str, str]:
    return type(finding), finding.kind, finding.name
