"""The phases of a run in order: how long each was, what it froze, and why it ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mtl.results.report.markup import Html, code, joined, left_title, seconds, separated, table, tag, text_cell
from mtl.results.report.palette import NUM_LINES
from mtl.results.report.run import PhaseSpan, RunFiles

# With more phases than these, the bar has room for their numbers only.
_MOST_WORDS = 10


def timeline_html(run: RunFiles) -> Html:
    spans = run.spans
    if not spans:
        return Html()
    plans = {phase["name"]: phase for phase in run.plan.get("phases", ())}
    rows = [
        [
            str(number),
            tag("th", span.name, scope="row"),
            _steps(span),
            str(span.epochs),
            seconds(span.train_s),
            text_cell(_frozen(run, plans, span.name)),
            text_cell(_reason(run, span)),
        ]
        for number, span in enumerate(spans, 1)
    ]
    header = ["", left_title("phase"), "steps", "epochs", "time", left_title("frozen"), left_title("why it ended")]
    left = [name for name in plans if name not in {span.name for span in spans}]
    note = f"Not begun: {', '.join(left)}." if left else None
    return joined([_bar(spans), table("Phases", header, rows), note and tag("p", note, class_="note")])


def _bar(spans: Sequence[PhaseSpan]) -> Html:
    """The phases side by side, as wide as they have steps; the table says the same in words."""
    widths = [max(span.end - span.begin, 1) for span in spans]
    has_words = len(spans) <= _MOST_WORDS
    return tag(
        "div",
        *(
            tag(
                "div",
                f"{number} {span.name}" if has_words else str(number),
                tag("small", _steps(span)) if has_words else None,
                style=f"flex:{width} 1 0",
                class_=f"tint-{(number - 1) % NUM_LINES}",
            )
            for number, (span, width) in enumerate(zip(spans, widths, strict=True), 1)
        ),
        class_="bar",
        aria_hidden="true",
    )


def _steps(span: PhaseSpan) -> str:
    return "no steps" if span.end == span.begin else f"{span.begin + 1:,} to {span.end:,}"


def _frozen(run: RunFiles, plans: dict[str, dict[str, Any]], name: str) -> Html:
    """The patterns of what a phase freezes, from its plan, else from its audit."""
    plan = plans.get(name)
    if plan is None:
        patterns: list[str] = next((phase["freeze"] for phase in run.audit["phases"] if phase["name"] == name), [])
        return separated([code(pattern) for pattern in patterns], ", ") if patterns else joined(["nothing"])
    train, freeze = plan.get("train", []), plan["freeze"]
    if not plan.get("optimizer", "given"):
        return joined(["everything: it only evaluates"])
    shown = [joined(["all but ", separated([code(each) for each in train], ", ")])] if train else []
    shown += [code(each) for each in freeze]
    return separated(shown, ", ") if shown else joined(["nothing"])


def _reason(run: RunFiles, span: PhaseSpan) -> str:
    if span.reason is not None:
        return span.reason
    ended = any(phase["name"] == span.name and phase["completed"] for phase in run.audit["phases"])
    return "not recorded by this run" if ended else "it has not ended"
