"""Proves a finished run again from its own files."""

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
class RunAudit:
    """The result of an audit of a run's files; its attributes are keys of the printed JSON.

    Attributes:
        num_tensors: Tensors of checkpoints that have the fingerprints of their phase's begin.
        num_checkpoints: Checkpoints that were checked.
        num_unkept: Names in a contract that no checkpoint of its phase has, such as non-persistent buffers.
        num_foreign: Checkpoints of a phase that `audit.json` does not have.
        findings: Violations, one sentence each.
        unproven: What cannot be proven from these files, one sentence each.
    """

    num_tensors: int = 0
    num_checkpoints: int = 0
    num_unkept: int = 0
    num_foreign: int = 0
    findings: list[str] = field(default_factory=list)
    unproven: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether something was proven, and there are no findings."""
        return self.num_tensors > 0 and not self.findings

    @property
    def is_broken(self) -> bool:
        """Whether there are findings."""
        return bool(self.findings)

    def to_json(self) -> dict[str, Any]:
        return {"ok": self.ok, **vars(self)}

    def __str__(self) -> str:
        lines = [f"  {each}" for each in self.findings] + [f"  not proven: {each}" for each in self.unproven]
        verdict = f"{len(self.findings)} not as frozen" if self.findings else "clean" if self.ok else "nothing proven"
        tensors, checkpoints = count(self.num_tensors, "frozen tensor"), count(self.num_checkpoints, "checkpoint")
        have = "has" if self.num_tensors == 1 else "have"
        return "\n".join([*lines, f"audit: {verdict}; {tensors} in {checkpoints} {have} the bytes of their phase"])


def audit_run(run_dir: Path) -> RunAudit:
    """Proves a run again from `audit.json` and its checkpoints, without model and configuration.

    Every checkpoint must have the digests that its `state.json` records, and its phase's frozen tensors must have the
    fingerprints of the phase's begin.

    Raises:
        RunFileError: `audit.json` is damaged.
        UnreadableError: There is no `audit.json`, or no checkpoint of a clean run.
    """
    if not (run_dir / AUDIT).is_file():
        raise UnreadableError(f"{run_dir}: is not the directory of a finished run: it has no {AUDIT}")
    audit = read_audit(run_dir / AUDIT)
    result = RunAudit()
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
        _check_checkpoint(folder, phases, result, unkept)
    _add_unproven(phases, unkept, result)
    return result


def _contradictions(phases: list[dict[str, Any]]) -> list[str]:
    """Contradictions between the phases of an `audit.json`, one sentence each."""
    found = []
    for name in sorted({phase["name"] for phase in phases if sum(p["name"] == phase["name"] for p in phases) > 1}):
        found.append(f"{AUDIT}: has several phases {name!r}")
    for phase in phases:
        frozen = phase["frozen"]
        if root(frozen["fingerprints"]) != frozen["root"]:
            found.append(f"{AUDIT}: the fingerprints of phase {phase['name']!r} are not those of its root")
        if len(frozen["fingerprints"]) != frozen["count"]:
            counts = f"{frozen['count']} frozen tensors, and lists {len(frozen['fingerprints'])}"
            found.append(f"{AUDIT}: says that phase {phase['name']!r} has {counts}")
    return found


def _check_checkpoint(
    folder: Path, phases: Mapping[str, Any], result: RunAudit, unkept: dict[str, list[set[str]]]
) -> None:
    """Checks one checkpoint; adds to `unkept`, by phase, the names in its contract that the checkpoint lacks."""
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
    """Differences between a checkpoint and its recorded digests, one sentence each."""
    written, found = dict(state.get("digests", {})), []
    if is_in_shards(folder):
        found += damaged_shards(folder, state)
    elif root({name: each for name, each in digests.items() if name not in state.get("tied", {})}) != written.get(
        "model"
    ):
        found.append(
            f"{_damaged_file(folder, written.get('frozen'))}: holds other tensors than were written at this step"
        )
    # Earlier versions wrote no digest of this file.
    digest = written.pop("state", None)
    if digest is not None and digest != fingerprint_of_json({**state, "digests": written}):
        found.append(f"{folder / 'state.json'}: says other things than were written at this step")
    return found


def _damaged_file(folder: Path, frozen: str | None) -> Path:
    """Which of the two files differs from what was written; `frozen` is the digest of the frozen tensors, if any."""
    frozen_file = folder / "frozen.safetensors"
    if frozen is None:
        return folder / "model.safetensors"
    tensors: dict[str, Tensor] = read_tensor_file(frozen_file)
    is_sound = root({name: fingerprint(tensor) for name, tensor in tensors.items()}) == frozen
    return folder / "model.safetensors" if is_sound else frozen_file


def _add_unproven(phases: Mapping[str, Any], unkept: Mapping[str, list[set[str]]], result: RunAudit) -> None:
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
