"""Where a run comes from: machine, versions, commit, command, tracking, changes on resume, configuration."""

from __future__ import annotations

import os
from typing import Any

from mtl.results.report.markup import DASH, Html, Piece, code, definitions, joined, left_title, table, tag, text_cell
from mtl.results.report.run import RunFiles
from mtl.runtime.text import in_bytes

UNKNOWN = "not recorded by this run"


def origin_html(run: RunFiles) -> Html:
    pieces: list[Piece] = [_facts(run), _sessions(run), history_html(run.history)]
    return joined(pieces)


def history_html(history: dict[str, Any]) -> Html:
    """The command that started a run and the settings changed on resume; empty for a run without a history."""
    if not history:
        return Html()
    pieces: list[Piece] = [tag("h3", "Command"), tag("pre", history["command"] or "not known")]
    if history.get("from"):
        pieces.append(tag("p", "Started from ", code(history["from"]), "."))
    rows = [
        [
            str(change["step"]),
            tag("td", code(change["key"])),
            text_cell(_value(change["old"])),
            text_cell(_value(change["new"])),
        ]
        for change in history["changes"]
    ]
    if rows:
        header = ["after step", left_title("key"), left_title("before"), left_title("since then")]
        pieces += [tag("h3", "Settings changed on resume"), table("Settings changed on resume", header, rows)]
    return joined(pieces)


def configuration_html(run: RunFiles) -> Html:
    return tag("pre", run.config_text.rstrip())


def _value(value: Any) -> str:
    return "nothing" if value is None else str(value)


def _facts(run: RunFiles) -> Html:
    sessions = run.results.get("sessions", [])
    latest = sessions[-1] if sessions else run.state
    machine = latest.get("machine", {})
    versions = latest.get("versions", {})
    memory = machine.get("memory_bytes")
    facts: dict[str, Piece] = {
        "Device": _device(latest),
        "Processor": machine.get("processor") or UNKNOWN,
        "Cores": str(machine.get("cores") or UNKNOWN),
        "Memory": in_bytes(memory) if memory else UNKNOWN,
        "System": machine.get("system") or UNKNOWN,
        "Processes": str(run.state.get("world_size", UNKNOWN)),
        "Commit": _commit(latest.get("git_commit")),
    }
    listed = ", ".join(f"{name} {number}" for name, number in versions.items()) or UNKNOWN
    tracking = tag("p", "Tracking: ", _tracking(run), ".", class_="note")
    return joined([definitions(facts), tag("p", "Versions: ", listed, ".", class_="note"), tracking])


def _commit(commit: str | None) -> Piece:
    """The commit in short; a `+` at its end says that the code was changed since."""
    if not commit:
        return "no checkout"
    is_changed = commit.endswith("+")
    return joined([tag("code", commit[:12], title=commit), ", with changes" if is_changed else None])


def _device(session: dict[str, Any]) -> str:
    if "device" not in session:
        return UNKNOWN
    return f"{session['device']} ({session['gpu']})" if session.get("gpu") else str(session["device"])


def _tracking(run: RunFiles) -> Piece:
    """A link to the run in its tracking service; reading the page follows no link."""
    addresses = [session.get("tracked_at") for session in run.results.get("sessions", ())]
    address = next((each for each in reversed(addresses) if each), None)
    if address is not None:
        # Anything else would not lead to a page, and might run something.
        is_link = address.startswith(("https://", "http://"))
        return tag("a", address, href=address, rel="noreferrer noopener") if is_link else address
    folders = sorted((run.folder / "wandb").glob("offline-run-*"))
    if folders:
        return joined(["offline; ", code(f"wandb sync {os.path.relpath(folders[-1])}")])
    return "metrics.jsonl alone"


def _sessions(run: RunFiles) -> Html:
    """The processes that trained the run one after the other; nothing if it was never interrupted."""
    sessions = run.results.get("sessions", [])
    if len(sessions) < 2:
        return Html()
    rows = [
        [
            str(session["step"]),
            text_cell(session["began"]),
            text_cell(_device(session)),
            text_cell(str(session["machine"].get("processor") or DASH)),
            tag("td", code((session["git_commit"] or DASH)[:12])),
            text_cell(", ".join(f"{name} {each}" for name, each in session["versions"].items())),
        ]
        for session in sessions
    ]
    header: list[Piece] = ["from step", *map(left_title, ("began", "device", "processor", "commit", "versions"))]
    return joined([tag("h3", "Sessions"), table("Sessions", header, rows)])
