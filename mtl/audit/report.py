"""What the audit found, as plain data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mtl.names import shorten


@dataclass(frozen=True)
class Violation:
    """One breach of the contract.

    Attributes:
        kind: `param_changed`, `buffer_changed`, `attr_changed`, `grad_present`, `requires_grad`, `in_optimizer`,
            `not_in_optimizer`, `in_several_groups`, `identity_changed`, `train_mode`, `shared_storage`,
            `never_trained`, `never_received_grad`, or `stopped_training`.
        name: The tensor's full name; for `train_mode`, the module's.
        phase: The phase in which it was found.
        step: Steps done in the phase when it was found.
        cause: What most likely did it.
        detail: What was seen.
        since: The last step after which it was known to be right; it happened between then and `step`.
        max_abs: Of changed bytes, the largest difference of two elements; NaN if one is not a number.
        share: Of changed bytes, the share of elements whose bits differ.
    """

    kind: str
    name: str
    phase: str
    step: int
    cause: str
    detail: str
    since: int
    max_abs: float | None = None
    share: float | None = None

    def __str__(self) -> str:
        return grouped([self])[0]


def grouped(violations: Iterable[Violation]) -> list[str]:
    """One line for all violations that have phase, step, kind, detail and cause in common: 62 tensors, one line."""
    groups: dict[tuple[str, int, str, str, str], list[Violation]] = {}
    for violation in violations:
        key = (violation.phase, violation.step, violation.kind, violation.detail, violation.cause)
        groups.setdefault(key, []).append(violation)
    lines = []
    for (phase, step, kind, detail, cause), group in groups.items():
        names = shorten([violation.name for violation in group], 3)
        who = names if len(group) == 1 else f"{len(group)} tensors ({names})"
        since = min(violation.since for violation in group)
        # What is seen at once happened in that step; bytes may have changed in any step since they were last read.
        when = f"step {step}" if since >= step - 1 else f"steps {since + 1} to {step}"
        lines.append(f"phase {phase!r}, {when}, {who}: {kind}: {detail}{_size(group)}; likely cause: {cause}")
    return lines


def _size(group: Sequence[Violation]) -> str:
    """The largest change of a group, in words."""
    sizes = [(v.max_abs, v.share) for v in group if v.max_abs is not None and v.share is not None]
    if not sizes:
        return ""
    largest = max(sizes, key=lambda size: math.inf if math.isnan(size[0]) else size[0])[0]
    return f" (by up to {largest:.3g}, in {max(share for _, share in sizes):.1%} of the elements)"


class AuditError(RuntimeError):
    """Raised under the policy `raise`; carries every violation found at that moment."""

    def __init__(self, violations: Sequence[Violation]) -> None:
        lines = grouped(violations)
        shown = lines[:5]
        if len(lines) > 5:
            shown.append(f"and {len(lines) - 5} more kinds at the same moment")
        super().__init__("the freeze was broken:\n  " + "\n  ".join(shown))
        self.violations = list(violations)


@dataclass
class PhaseRecord:
    """What was checked in one phase, how often, and with what result.

    Attributes:
        name: The phase.
        freeze: The patterns of its contract.
        fingerprints: Of every frozen tensor, by name, when the phase began.
        root: One digest of them all.
        num_trainable: Parameters outside the contract.
        num_trained: Those of them whose bytes differ between the phase's begin and end.
        num_steps: Steps seen.
        num_tripwire_checks: Looks at one tensor or module between steps.
        num_fingerprint_checks: Digests compared with the first ones.
        completed: Whether the phase ended without an exception.
        violations: What was found.
    """

    name: str
    freeze: list[str]
    fingerprints: dict[str, str] = field(default_factory=dict)
    root: str = ""
    num_trainable: int = 0
    num_trained: int = 0
    num_steps: int = 0
    num_tripwire_checks: int = 0
    num_fingerprint_checks: int = 0
    completed: bool = False
    violations: list[Violation] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.violations

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "ok": self.ok,
            "completed": self.completed,
            "freeze": self.freeze,
            "frozen": {"count": len(self.fingerprints), "root": self.root, "fingerprints": self.fingerprints},
            "trainable": {"count": self.num_trainable, "changed": self.num_trained},
            "checks": {
                "steps": self.num_steps,
                "tripwires": self.num_tripwire_checks,
                "fingerprints": self.num_fingerprint_checks,
            },
            "violations": [asdict(violation) for violation in self.violations],
        }


@dataclass
class Report:
    """The audit of a run: its phases in order."""

    phases: list[PhaseRecord] = field(default_factory=list)

    @property
    def violations(self) -> list[Violation]:
        return [violation for phase in self.phases for violation in phase.violations]

    @property
    def ok(self) -> bool:
        return not self.violations

    def to_json(self) -> dict[str, Any]:
        """The content of `audit.json`; what was cut short is not ok, for its end was never proven."""
        completed = bool(self.phases) and all(phase.completed for phase in self.phases)
        return {"ok": self.ok and completed, "phases": [phase.to_json() for phase in self.phases]}
