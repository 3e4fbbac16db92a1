"""The audit's proof of each phase, how to repeat it, and its findings."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mtl.results.report.markup import DASH, Html, Piece, code, joined, left_title, table, tag
from mtl.results.report.results import verdict_html
from mtl.results.report.run import RunFiles
from mtl.runtime.text import count, shorten

# Findings of one kind at one moment are one entry; of more entries than these, the others are counted.
_MOST_ENTRIES = 40
_MOST_NAMES = 4
_AS_FINDINGS = ("phase", "step", "kind", "detail", "cause", "pattern")


def proof_html(run: RunFiles) -> Html:
    again = tag("pre", f"mtl audit {shlex.quote(str(run.folder))}")
    phases = run.audit["phases"]
    pieces: list[Piece] = [tag("p", verdict_html(run)), _phases(phases)]
    pieces += [tag("p", "To prove it again from the files of the run:"), again]
    findings = _findings(run, "violations")
    pieces += [tag("h3", "Violations"), _list(findings) if findings else tag("p", "None.")]
    hazards = _findings(run, "hazards")
    meaning = "Set-ups in which a frozen tensor could move, or frozen code is not constant."
    pieces += [tag("h3", "Hazards"), tag("p", meaning, class_="note"), _list(hazards) if hazards else tag("p", "None.")]
    return joined(pieces)


def _phases(phases: Sequence[Mapping[str, Any]]) -> Html:
    rows = [
        [
            phase["name"],
            tag("td", _proven(phase)),
            str(phase["frozen"]["count"]),
            tag("td", code(phase["frozen"]["root"][:12] or DASH), title=phase["frozen"]["root"]),
            f"{phase['trainable']['changed']} of {phase['trainable']['count']}",
            f"{phase['checks']['steps']:,}",
            f"{phase['checks']['tripwires']:,}",
            f"{phase['checks']['fingerprints']:,}",
            str(len(phase["violations"])),
            str(len(phase.get("hazards", ()))),
        ]
        for phase in phases
    ]
    titles = ["phase", left_title("proven"), "frozen tensors", left_title("their digest"), "trained", "steps"]
    titles += ["flags and versions checked", "digests compared", "violations", "hazards"]
    return table("The audit by phase", titles, rows)


def _proven(phase: Mapping[str, Any]) -> Html:
    if phase["violations"]:
        return tag("b", "broken", class_="bad")
    if not phase["completed"]:
        return tag("b", "not finished", class_="warn")
    if phase.get("unproven"):
        return joined([tag("b", "not proven", class_="warn"), f": {phase['unproven']}"])
    return tag("b", "yes", class_="good")


def _findings(run: RunFiles, which: str) -> list[tuple[str, dict[str, Any]]]:
    """Violations or hazards of all ranks, each with its rank in words."""
    audits = [("", run.audit), *((f"rank {rank}: ", audit) for rank, audit in run.rank_audits.items())]
    return [(rank, each) for rank, audit in audits for phase in audit["phases"] for each in phase.get(which, ())]


def _list(findings: Iterable[tuple[str, dict[str, Any]]]) -> Html:
    """One entry for all findings that differ only in name and size."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for rank, each in findings:
        groups.setdefault((rank, *(each.get(key) for key in _AS_FINDINGS)), []).append(each)
    entries = [tag("li", _entry(key[0], group)) for key, group in list(groups.items())[:_MOST_ENTRIES]]
    if len(groups) > _MOST_ENTRIES:
        entries.append(tag("li", f"and {len(groups) - _MOST_ENTRIES} more; see audit.json"))
    return tag("ul", *entries, class_="list")


def _entry(rank: str, group: Sequence[Mapping[str, Any]]) -> Html:
    first = group[0]
    names = shorten([each["name"] for each in group], _MOST_NAMES)
    since = min(each.get("since", each["step"]) for each in group)
    step = first["step"]
    when = f"step {step}" if since >= step - 1 else f"steps {since + 1} to {step}"
    who = joined([] if len(group) == 1 else [f"{count(len(group), 'tensor')}: "])
    pattern = first.get("pattern")
    return joined(
        [
            f"{rank}phase {first['phase']}, {when}, ",
            who,
            code(names),
            joined([": ", tag("b", first["kind"]), f": {first['detail']}{_size(group)}"]),
            joined(["; frozen by ", code(pattern)]) if pattern else None,
            tag("br"),
            tag("span", "likely cause: ", class_="note"),
            first["cause"],
        ]
    )


def _size(group: Sequence[Mapping[str, Any]]) -> str:
    """The largest change of a group, in words."""
    sizes = [each["max_abs"] for each in group if each.get("max_abs") is not None]
    return f" (by up to {max(sizes):.3g})" if sizes else ""
