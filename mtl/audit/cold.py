"""The cold audit: a finished run is proven again from its own files."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtl.audit.files import UnreadableError, is_in_shards, read_tensors
from mtl.audit.fingerprint import fingerprint, fingerprint_of_json, root
from mtl.audit.shards import damaged_shards


@dataclass
class ColdAudit:
    """What was looked at, and what was found.

    Attributes:
        num_tensors: Tensors of checkpoints whose bytes were compared with the fingerprints of their phase.
        num_checkpoints: Checkpoints looked at.
        num_unkept: Names in a contract that no checkpoint holds, such as buffers that are not kept.
        num_foreign: Checkpoints taken over from another run, whose contract is not known here.
        findings: What is wrong, one sentence each.
    """

    num_tensors: int = 0
    num_checkpoints: int = 0
    num_unkept: int = 0
    num_foreign: int = 0
    findings: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        return {"ok": self.ok, **vars(self)}


def audit_run(run_dir: Path) -> ColdAudit:
    """Proves a run again from `audit.json` and its checkpoints, with no model and no configuration.

    Every kept checkpoint has to hold, byte for byte, what its `state.json` says was written; and of that, what the
    phase that wrote it had frozen has to have the fingerprints that the phase began with.

    Raises:
        UnreadableError: There is no `audit.json`, or no checkpoint.
    """
    audit = _read_json(run_dir / "audit.json")
    result = ColdAudit()
    if not audit.get("ok"):
        result.findings.append("audit.json: the run was not clean, or it was cut short")
    for file in sorted(run_dir.glob("audit.rank-*.json")):
        result.findings.append(f"{file.name}: in this process of the run, the freeze was broken")
    phases = {phase["name"]: phase for phase in audit["phases"]}
    for name, phase in phases.items():
        if root(phase["frozen"]["fingerprints"]) != phase["frozen"]["root"]:
            result.findings.append(f"audit.json: the fingerprints of phase {name!r} are not those of its root")
    folders = sorted(path for path in (run_dir / "checkpoints").glob("step-*") if path.is_dir())
    if not folders:
        raise UnreadableError(f"{run_dir}: has no checkpoints")
    for folder in folders:
        _look_at(folder, phases, result)
    return result


def _look_at(folder: Path, phases: dict[str, Any], result: ColdAudit) -> None:
    result.num_checkpoints += 1
    try:
        state = _read_json(folder / "state.json")
        tensors = read_tensors(folder)
    except UnreadableError as error:
        result.findings.append(str(error))
        return
    digests = {name: fingerprint(tensor) for name, tensor in tensors.items()}
    written = state.get("digests", {})
    if is_in_shards(folder):
        result.findings += damaged_shards(folder, state)
    elif root(digests) != written.get("model"):
        result.findings.append(_damage(folder, written.get("frozen")))
    # Runs of before had no digest of this file.
    if "state" in written and written.pop("state") != fingerprint_of_json(state):
        result.findings.append(f"{folder / 'state.json'}: says other things than were written at this step")
    phase = phases.get(state.get("phase", ""))
    if phase is None:
        result.num_foreign += 1
        return
    for name, digest in phase["frozen"]["fingerprints"].items():
        if name not in digests:
            result.num_unkept += 1
            continue
        result.num_tensors += 1
        if digests[name] != digest:
            result.findings.append(f"{folder.name}: {name} was frozen in phase {state['phase']!r}, and is not the same")


def _damage(folder: Path, frozen: str | None) -> str:
    """Which of the two files holds other tensors than were written; `frozen` is the digest of those frozen, if any."""
    file = folder / "model.safetensors"
    if frozen is not None:
        beside = folder / "frozen.safetensors"
        try:
            tensors = read_tensors(beside)
        except UnreadableError as error:
            return str(error)
        if root({name: fingerprint(tensor) for name, tensor in tensors.items()}) != frozen:
            file = beside
    return f"{file}: holds other tensors than were written at this step"


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnreadableError(f"{file}: cannot be read: {error}") from error
    return content
