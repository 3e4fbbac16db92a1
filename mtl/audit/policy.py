"""The policies for findings: each is recorded once per phase, and then raised, warned of, or repaired."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Literal, get_args

from mtl.audit.report import AuditError, Finding, Hazard, PhaseRecord, Violation, grouped

Policy = Literal["raise", "warn", "collect", "restore"]
# A warning names the line that called one of these.
_AUDIT = (__name__, "mtl.audit.audit", "mtl.audit.fit", "contextlib")


class Reporter:
    """Records findings, and does what the policy says."""

    def __init__(self, policy: Policy, strict: bool) -> None:
        """Args: as `GradientAudit` has them.

        Raises:
            ValueError: The policy is none of these.
        """
        if policy not in get_args(Policy):
            raise ValueError(f"expected the policy raise, warn, collect or restore, got {policy!r}")
        self._policy = policy
        self._strict = strict
        self._recorded: set[tuple[type[Finding], str, str]] = set()
        self._warned: set[tuple[str, str]] = set()

    def begin(self, record: PhaseRecord) -> None:
        """Starts a phase; the findings of a resumed one are not recorded again."""
        self._recorded = {_key(each) for each in (*record.violations, *record.hazards)}

    def handle(self, record: PhaseRecord, found: Iterable[Finding], restore: Callable[[], None]) -> None:
        """Records findings that are new in this phase, and applies the policy to them.

        Args:
            record: The phase's record.
            found: The findings; under `strict`, hazards are violations.
            restore: Restores the frozen bits; called under the policy `restore`.

        Raises:
            AuditError: Under the policy `raise`, there is a new violation.
        """
        if not found:
            return
        found = [Violation(**asdict(each)) if self._strict and isinstance(each, Hazard) else each for each in found]
        if self._policy == "restore" and any(isinstance(each, Violation) for each in found):
            restore()
        new = [each for each in found if _key(each) not in self._recorded]
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
                warnings.warn(str(violation), stacklevel=_depth_outside())

    def _warn_of(self, hazards: Sequence[Hazard]) -> None:
        """Warns of each hazard once, in however many phases it is found."""
        new = [each for each in hazards if (each.kind, each.name) not in self._warned]
        self._warned |= {(each.kind, each.name) for each in new}
        if self._policy != "collect":
            for line in grouped(new):
                warnings.warn(f"hazard: {line}", stacklevel=_depth_outside())


def _key(finding: Finding) -> tuple[type[Finding], str, str]:
    return type(finding), finding.kind, finding.name


def _depth_outside() -> int:
    """The `stacklevel` of the first frame outside the audit, counted from the caller."""
    depth, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals["__name__"] in _AUDIT:
        depth, frame = depth + 1, frame.f_back
    return depth
