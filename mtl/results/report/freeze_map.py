"""The freeze map: parts of the model from the input on, and what each phase does with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mtl.results.report.markup import Html, hidden, joined, scrolling, tag
from mtl.results.report.run import RunFiles

# With more phases than these, a cell has no room for words.
_MOST_WORDS = 8
KEYS = {
    "frozen": "frozen",
    "trained": "trained",
    "partly": "frozen in part",
    "idle": "not frozen, but no active task reaches it",
}


def freeze_map_html(run: RunFiles) -> Html:
    phases = run.plan.get("phases", [])
    if not phases or not all(phase.get("parts") for phase in phases):
        return joined([tag("p", "This run did not record which parts each phase freezes.", class_="note")])
    names = [part["name"] for part in phases[0]["parts"]]
    has_words = len(phases) <= _MOST_WORDS
    rows = [
        tag("tr", tag("th", name, scope="row"), *(_cell(phase["parts"][at], has_words) for phase in phases))
        for at, name in enumerate(names)
    ]
    titles = [
        tag("th", phase["name"] if has_words else str(number), scope="col", title=phase["name"])
        for number, phase in enumerate(phases, 1)
    ]
    label = "Parts of the model by phase"
    inner = tag(
        "table",
        tag("caption", label),
        tag("thead", tag("tr", tag("th", "part", scope="col"), *titles)),
        tag("tbody", *rows),
        class_="map" if has_words else "map narrow",
    )
    keys = [tag("li", tag("i", class_=key), meaning) for key, meaning in KEYS.items()]
    note = (
        "Depth groups of the trunk from the input on, by number and first module, then heads and other weights; a cell"
        " counts parameter tensors where they differ."
    )
    return joined([tag("ul", *keys, class_="keys"), scrolling(inner, label), tag("p", note, class_="note")])


def state_of(part: Mapping[str, Any]) -> str:
    """The treatment of a part in a phase: a key of `KEYS`."""
    count, frozen, unreached = part["count"], part["frozen"], part["unreached"]
    if frozen == count:
        return "frozen"
    if unreached and frozen + unreached == count:
        return "idle"
    return "partly" if frozen else "trained"


def _cell(part: Mapping[str, Any], has_words: bool) -> Html:
    state = state_of(part)
    words = f"{part['frozen']} of {part['count']}" if state == "partly" else state
    if state == "idle":
        words = "unreached"
    return tag("td", words if has_words else hidden(words), class_=state, title=None if has_words else words)
