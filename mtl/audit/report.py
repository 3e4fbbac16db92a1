"""What the audit found, as plain data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from typing import Any

from mtl.runtime.text import shorten

# Kinds that say that what should train does not; all others but `ranks_differ` are about what is frozen.
LIVENESS = (
    *("never_trained", "never_received_grad", "stopped_training", "not_finite", "gradients_dropped"),
    *("not_in_optimizer", "in_several_groups"),
)


@dataclass(frozen=True)
class Finding:
    """What was seen of one tensor or module.

    Attributes:
        kind: `param_changed`, `buffer_changed`, `attr_changed`, `grad_present`, `requires_grad`, `in_optimizer`,
            `not_in_optimizer`, `in_several_groups`, `identity_changed`, `train_mode`, `batch_statistics`,
            `active_dropout`, `shared_storage`, `fixed_parameter`, `never_trained`, `never_received_grad`,
            `stopped_training`, `not_finite`, `gradients_dropped`, or `ranks_differ`: the processes of a run hold other
            bytes, or other tensors.
        name: The tensor's full name; a module's for `train_mode`, `batch_statistics` and `active_dropout`.
        phase: The phase in which it was found.
        step: Steps done in the phase when it was found.
        cause: What most likely did it.
        detail: What was seen.
        since: The last step after which it was known to be right; it happened between then and `step`.
        max_abs: Of changed bytes, the largest difference of two elements; NaN if one is not a number.
        share: Of changed bytes, the share of elements whose bits differ.
        pattern: Of something frozen, the pattern that froze it, and where that was written if the audit was told.
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
    pattern: str | None = None

    def __str__(self) -> str:
        return grouped([self])[0]


class Violation(Finding):
    """A broken contract: something frozen moved or received a gradient, or what should train did not."""


class Hazard(Finding):
    """A set-up in which nothing frozen has moved yet, but could; or in which frozen does not mean constant."""


def grouped(findings: Iterable[Finding]) -> list[str]:
    """One line for all findings that have all in common but the name and the size: 62 tensors, one line."""
    groups: dict[tuple[str, int, str, str, str, str | None], list[Finding]] = {}
    for each in findings:
        key = (each.phase, each.step, each.kind, each.detail, each.cause, each.pattern)
        groups.setdefault(key, []).append(each)
    lines = []
    for (phase, step, kind, detail, cause, pattern), group in groups.items():
        names = shorten([each.name for each in group], 3)
        who = names if len(group) == 1 else f"{len(group)} tensors ({names})"
        since = min(each.since for each in group)
        froze = "" if pattern is None else f"; frozen by {pattern}"
        # What is seen at once happened in that step; bytes may have changed in any step since they were last read.
        when = f"step {step}" if since >= step - 1 else f"steps {since + 1} to {step}"
        lines.append(f"phase {phase!r}, {when}, {who}: {kind}: {detail}{_size(group)}{froze}; likely cause: {cause}")
    return lines


def _size(group: Sequence[Finding]) -> str:
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
        super().__init__(f"{_headline(violations)}:\n  " + "\n  ".join(shown))
        self.violations = list(violations)


def _headline(violations: Sequence[Violation]) -> str:
    kinds = {violation.kind for violation in violations}
    parts = []
    if kinds - {*LIVENESS, "ranks_differ"}:
        parts.append("the freeze was broken")
    if kinds & {*LIVENESS}:
        parts.append("what should train does not")
    if "ranks_differ" in kinds:
        parts.append("the ranks of the run differ")
    return ", and ".join(parts)


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
        unproven: Why a phase that ended proves nothing all the same; empty if it does.
        violations: What was found.
        hazards: Set-ups that were found and could break the contract.
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
    unproven: str = ""
    violations: list[Violation] = field(default_factory=list)
    hazards: list[Hazard] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the phase has ended, and proved what it was to prove."""
        return self.completed and not self.unproven and not self.violations

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
        fields["hazards"] = [Hazard(**hazard) for hazard in fields.get("hazards", ())]
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
            "unproven": self.unproven,
            "violations": [asdict(violation) for violation in self.violations],
            "hazards": [asdict(hazard) for hazard in self.hazards],
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
    def hazards(self) -> list[Hazard]:
        return [hazard for phase in self.phases for hazard in phase.hazards]

    @property
    def ok(self) -> bool:
        """Whether there was something to prove, and all of it is proven: what was cut short is not."""
        return bool(self.phases) and all(phase.ok for phase in self.phases)

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
        """The content of `audit.json`."""
        return {"ok": self.ok, "phases": [phase.to_json() for phase in self.phases]}
