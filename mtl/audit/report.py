"""The audit's findings as plain data: violations, hazards, the record of each phase, the report of a run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from typing import Any

from mtl.runtime.text import shorten

# Kinds about trainable parameters that do not train; all others but `ranks_differ` are about frozen tensors.
LIVENESS = (
    *("never_trained", "never_received_grad", "stopped_training", "not_finite", "gradients_dropped"),
    *("not_in_optimizer", "in_several_groups"),
)


@dataclass(frozen=True)
class Finding:
    """Something wrong with one tensor or module.

    Attributes:
        kind: `param_changed`, `buffer_changed`, `attr_changed`, `grad_present`, `requires_grad`, `in_optimizer`,
            `not_in_optimizer`, `in_several_groups`, `identity_changed`, `train_mode`, `batch_statistics`,
            `active_dropout`, `shared_storage`, `fixed_parameter`, `never_trained`, `never_received_grad`,
            `stopped_training`, `not_finite`, `gradients_dropped`, or `ranks_differ`: the ranks of a run have different
            bytes, or different tensors.
        name: The tensor's full name; a module's for `train_mode`, `batch_statistics` and `active_dropout`.
        phase: The phase in which it was found.
        step: Steps done in the phase when it was found.
        cause: The most likely cause, with the fix.
        detail: What was observed.
        since: The last step after which it was known to be right; it happened between then and `step`.
        max_abs: Of changed bytes, the largest absolute difference of two elements; NaN if one of them is NaN.
        share: Of changed bytes, the share of elements whose bits differ, 0 to 1.
        pattern: Of a frozen tensor, the pattern that froze it, and the file and line of the pattern if they are known.
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
    """A broken contract: a frozen tensor changed or received a gradient, or a trainable parameter did not train."""


class Hazard(Finding):
    """A set-up in which a frozen tensor could change, or in which a frozen module's output is not constant."""


def grouped(findings: Iterable[Finding]) -> list[str]:
    """One line for all findings that differ only in name and size: 62 tensors, one line."""
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
        # Flags are checked in every step; bytes may have changed in any step since they were last read.
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
    """Raised under the policy `raise`; carries every violation found by one check."""

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
        parts.append("trainable parameters do not train")
    if "ranks_differ" in kinds:
        parts.append("the ranks of the run differ")
    return ", and ".join(parts)


@dataclass
class PhaseRecord:
    """The checks of one phase and their result.

    Attributes:
        name: The phase's name.
        freeze: The patterns of its contract.
        fingerprints: Of every frozen tensor, by name, when the phase began.
        root: One digest of all fingerprints.
        num_trainable: Trainable parameters.
        num_trained: Trainable parameters whose bytes differ between the phase's begin and end.
        num_steps: Optimizer steps.
        num_tripwire_checks: Checks of one tensor or module between steps.
        num_fingerprint_checks: Digests compared with the original ones.
        completed: Whether the phase ended without an exception.
        unproven: Why a phase that ended proves nothing nevertheless; empty if it does.
        violations: The violations.
        hazards: The hazards.
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
        """Whether the phase has ended with its contract proven."""
        return self.completed and not self.unproven and not self.violations

    def state_dict(self) -> dict[str, Any]:
        """The record as plain data, for `load_state_dict`; its attributes are keys on disk."""
        return asdict(self)

    def difference_from(self, state: Mapping[str, Any]) -> str | None:
        """The first difference between a state and this phase and contract, in words; None if there is none."""
        if state["name"] != self.name:
            return f"the state was taken inside the phase {state['name']!r}"
        for before, now in zip_longest(state["freeze"], self.freeze):
            if before != now:
                wanted, got = (f"the pattern {p!r}" if p is not None else "no further pattern" for p in (before, now))
                return f"expected {wanted}, got {got}"
        for name in sorted(state["fingerprints"].keys() ^ self.fingerprints.keys()):
            was, is_now = (_unless(name in names) for names in (state["fingerprints"], self.fingerprints))
            return f"{name} was{was} frozen, and is{is_now} now"
        return None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads a state over this record."""
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
    """The audit of a run: the records of its phases, in order."""

    phases: list[PhaseRecord] = field(default_factory=list)

    @property
    def violations(self) -> list[Violation]:
        """The violations of all phases, in order."""
        return [violation for phase in self.phases for violation in phase.violations]

    @property
    def hazards(self) -> list[Hazard]:
        """The hazards of all phases, in order."""
        return [hazard for phase in self.phases for hazard in phase.hazards]

    @property
    def ok(self) -> bool:
        """Whether there was a phase, and each is proven; one that was cut short is not."""
        return bool(self.phases) and all(phase.ok for phase in self.phases)

    def state_dict(self) -> list[dict[str, Any]]:
        """The phases' records as plain data."""
        return [phase.state_dict() for phase in self.phases]

    def load_state_dict(self, state: Iterable[Mapping[str, Any]]) -> None:
        """Appends the phases of a state."""
        for each in state:
            record = PhaseRecord("", [])
            record.load_state_dict(each)
            self.phases.append(record)

    def to_json(self) -> dict[str, Any]:
        """The content of `audit.json`."""
        return {"ok": self.ok, "phases": [phase.to_json() for phase in self.phases]}
