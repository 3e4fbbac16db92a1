"""What the audit found, as plain data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from typing import Any

from mtl.names import shorten


@dataclass(frozen=True)
class Violation:
    """One breach of the contract.

    Attributes:
        kind: `param_changed`, `buffer_changed`, `attr_changed`, `grad_present`, `requires_grad`, `in_optimizer`,
            `not_in_optimizer`, `in_several_groups`, `identity_changed`, `train_mode`, `shared_storage`,
            `never_trained`, `never_received_grad`, `stopped_training`, or `ranks_differ`: the processes of a run hold
            other bytes, or other tensors.
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

    def breach(
        self,
        kind: str,
        name: str,
        cause: str,
        detail: str,
        since: int | None = None,
        max_abs: float | None = None,
        share: float | None = None,
    ) -> Violation:
        """A violation as it is seen now; without `since`, it happened in this very step."""
        since = self.num_steps if since is None else since
        return Violation(kind, name, self.name, self.num_steps, cause, detail, since, max_abs, share)

    def state(self) -> dict[str, Any]:
        """All of it as plain data, for `take_over`."""
        return asdict(self)

    def differs_from(self, state: Mapping[str, Any]) -> str | None:
        """The first thing in which a state is not one of this phase and contract, in words; None if it is one."""
        if state["name"] != self.name:
            return f"the state was taken inside the phase {state['name']!r}"
        for before, now in zip_longest(state["freeze"], self.freeze):
            if before != now:
                wanted, got = (repr(each) if each is not None else "no further one" for each in (before, now))
                return f"expected the pattern {wanted}, got {got}"
        for name in sorted(state["fingerprints"].keys() ^ self.fingerprints.keys()):
            was, is_now = (_unless(name in names) for names in (state["fingerprints"], self.fingerprints))
            return f"{name} was{was} frozen, and is{is_now} now"
        return None

    def take_over(self, state: Mapping[str, Any]) -> None:
        """Becomes the record whose state this is."""
        fields = deepcopy(dict(state))
        fields["violations"] = [Violation(**violation) for violation in fields["violations"]]
        vars(self).update(fields)

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


def _unless(holds: bool) -> str:
    return "" if holds else " not"


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

    def state(self) -> list[dict[str, Any]]:
        """Each phase's record as plain data."""
        return [phase.state() for phase in self.phases]

    def take_over(self, state: Iterable[Mapping[str, Any]]) -> None:
        """Adds the phases of a state."""
        for each in state:
            record = PhaseRecord("", [])
            record.take_over(each)
            self.phases.append(record)

    def to_json(self) -> dict[str, Any]:
        """The content of `audit.json`; what was cut short is not ok, for its end was never proven."""
        completed = bool(self.phases) and all(phase.completed for phase in self.phases)
        return {"ok": self.ok and completed, "phases": [phase.to_json() for phase in self.phases]}
