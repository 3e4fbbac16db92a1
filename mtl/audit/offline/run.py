"""The cold audit: a finished run is proven again from its own files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mtl.checkpoint.run_files import AUDIT, RunFileError, read_audit, read_state_file
from mtl.checkpoint.tensor_file import (
    UnreadableError,
    damaged_shards,
    is_in_shards,
    read_contents,
    read_tensor_file,
)
from mtl.runtime.fingerprint import fingerprint, fingerprint_of_json, root
from mtl.runtime.text import count, shorten


@dataclass
class ColdAudit:
    """What was looked at, and what was found.

    Attributes:
        num_tensors: Tensors of checkpoints that have the fingerprints with which their phase began.
        num_checkpoints: Checkpoints looked at.
        num_unkept: Names in a contract that no checkpoint of its phase holds, such as buffers that are not kept.
        num_foreign: Checkpoints of a phase that `audit.json` does not know, whose contract is not known here.
        findings: What is wrong, one sentence each.
        unproven: What nobody can know from the files that there are, one sentence each.
    """

    num_tensors: int = 0
    num_checkpoints: int = 0
    num_unkept: int = 0
    num_foreign: int = 0
    findings: list[str] = field(default_factory=list)
    unproven: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether something was proven, and nothing is wrong."""
        return self.num_tensors > 0 and not self.findings

    @property
    def is_broken(self) -> bool:
        """Whether something is wrong."""
        return bool(self.findings)

    def to_json(self) -> dict[str, Any]:
        return {"ok": self.ok, **vars(self)}

    def __str__(self) -> str:
        lines = [f"  {each}" for each in self.findings] + [f"  not proven: {each}" for each in self.unproven]
        verdict = f"{len(self.findings)} not as frozen" if self.findings else "clean" if self.ok else "nothing proven"
        tensors, checkpoints = count(self.num_tensors, "frozen tensor"), count(self.num_checkpoints, "checkpoint")
        have = "has" if self.num_tensors == 1 else "have"
        return "\n".join([*lines, f"audit: {verdict}; {tensors} in {checkpoints} {have} the bytes of their phase"])


def audit_run(run_dir: Path) -> ColdAudit:
    """Proves a run again from `audit.json` and its checkpoints, with no model and no configuration.

    Every kept checkpoint has to hold, byte for byte, what its `state.json` says was written; and of that, what the
    phase that wrote it had frozen has to have the fingerprints that the phase began with.

    Raises:
        RunFileError: There is no `audit.json`, or it is damaged.
        UnreadableError: There is no checkpoint of a run that was clean.
    """
    if not (run_dir / AUDIT).is_file():
        raise UnreadableError(f"{run_dir}: is not the directory of a finished run: it has no {AUDIT}")
    audit = read_audit(run_dir / AUDIT)
    result = ColdAudit()
    if not audit["ok"]:
        result.findings.append(f"{AUDIT}: the run was not clean, or it was cut short")
    for file in sorted(run_dir.glob("audit.rank-*.json")):
        result.findings.append(f"{file.name}: in this process of the run, the freeze was broken")
    phases = {phase["name"]: phase for phase in audit["phases"]}
    result.findings += _contradictions(audit["phases"])
    folders = sorted(path for path in (run_dir / "checkpoints").glob("step-*") if path.is_dir())
    if not folders and audit["ok"]:
        raise UnreadableError(f"{run_dir}: has no checkpoints")
    unkept: dict[str, list[set[str]]] = {}
    for folder in folders:
        _look_at(folder, phases, result, unkept)
    _say_what_is_unproven(phases, unkept, result)
    return result


def _contradictions(phases: list[dict[str, Any]]) -> list[str]:
    """In what the phases of an `audit.json` are not what was written."""
    found = []
    for name in sorted({phase["name"] for phase in phases if sum(p["name"] == phase["name"] for p in phases) > 1}):
        found.append(f"{AUDIT}: has several phases {name!r}")
    for phase in phases:
        frozen = phase["frozen"]
        if root(frozen["fingerprints"]) != frozen["root"]:
            found.append(f"{AUDIT}: the fingerprints of phase {phase['name']!r} are not those of its root")
        if len(frozen["fingerprints"]) != frozen["count"]:
            said = f"{frozen['count']} frozen tensors, and lists {len(frozen['fingerprints'])}"
            found.append(f"{AUDIT}: says that phase {phase['name']!r} has {said}")
    return found


def _look_at(folder: Path, phases: Mapping[str, Any], result: ColdAudit, unkept: dict[str, list[set[str]]]) -> None:
    """Looks at one checkpoint; adds to `unkept`, by phase, the names in its contract that the checkpoint lacks."""
    result.num_checkpoints += 1
    try:
        state = read_state_file(folder / "state.json")
        digests = {name: fingerprint(tensor) for name, tensor in read_contents(folder).tensors.items()}
    except (RunFileError, UnreadableError) as error:
        result.findings.append(str(error))
        return
    result.findings += _damage(folder, state, digests)
    phase = phases.get(state.get("phase", ""))
    if phase is None:
        result.num_foreign += 1
        result.unproven.append(f"{folder.name}: of phase {state.get('phase')!r}, of which {AUDIT} has no contract")
        return
    fingerprints = phase["frozen"]["fingerprints"]
    unkept.setdefault(phase["name"], []).append(fingerprints.keys() - digests.keys())
    for name in fingerprints.keys() & digests.keys():
        result.num_tensors += digests[name] == fingerprints[name]
    result.findings += [
        f"{folder.name}: {name} was frozen in phase {phase['name']!r}, and is not the same"
        for name, digest in fingerprints.items()
        if name in digests and digests[name] != digest
    ]


def _damage(folder: Path, state: dict[str, Any], digests: Mapping[str, str]) -> list[str]:
    """In what a checkpoint is not what was written, one sentence each."""
    written, found = dict(state.get("digests", {})), []
    if is_in_shards(folder):
        found += damaged_shards(folder, state)
    elif root({name: each for name, each in digests.items() if name not in state.get("tied", {})}) != written.get(
        "model"
    ):
        found.append(
            f"{_damaged_file(folder, written.get('frozen'))}: holds other tensors than were written at this step"
        )
    # Runs of before had no digest of this file.
    digest = written.pop("state", None)
    if digest is not None and digest != fingerprint_of_json({**state, "digests": written}):
        found.append(f"{folder / 'state.json'}: says other things than were written at this step")
    return found


def _damaged_file(folder: Path, frozen: str | None) -> Path:
    """Which of the two files holds other tensors than were written; `frozen` is the digest of those frozen, if any."""
    beside = folder / "frozen.safetensors"
    if frozen is None:
        return folder / "model.safetensors"
    tensors: dict[str, Tensor] = read_tensor_file(beside)
    is_sound = root({name: fingerprint(tensor) for name, tensor in tensors.items()}) == frozen
    return folder / "model.safetensors" if is_sound else beside


def _say_what_is_unproven(phases: Mapping[str, Any], unkept: Mapping[str, list[set[str]]], result: ColdAudit) -> None:
    for name, phase in phases.items():
        num_frozen = len(phase["frozen"]["fingerprints"])
        lacking = set.intersection(*unkept[name]) if name in unkept else set()
        result.num_unkept += len(lacking)
        if lacking:
            names = shorten(sorted(lacking), 4)
            result.unproven.append(f"phase {name!r}: no checkpoint holds {names}, which it froze")
        if num_frozen and name not in unkept:
            result.unproven.append(f"phase {name!r}: it has no checkpoint; it froze {count(num_frozen, 'tensor')}")
    if not any(phase["frozen"]["fingerprints"] for phase in phases.values()):
        result.unproven.append("nothing was frozen in this run: nothing to prove")
