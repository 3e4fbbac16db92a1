"""Results: the audit's verdict in a word, the facts of a run, and the table of results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mtl.results.report.chart import ChartLine, line_chart, points
from mtl.results.report.markup import (
    DASH,
    Html,
    Piece,
    definitions,
    hidden,
    joined,
    left_title,
    number,
    seconds,
    table,
    tag,
)
from mtl.results.report.run import SCORE, RunFiles
from mtl.runtime.text import count

# By the word for the audit's verdict: its class, and what it means.
VERDICTS = {
    "clean": ("good", "Every frozen tensor kept its bits and received no gradient; what was to train did train."),
    "violations": ("bad", "The freeze was broken, or trainable parameters did not train: see the audit below."),
    "not finished": ("warn", "A phase did not come to its end, so its freeze is not proven."),
    "not proven": ("warn", "A phase ended without proof of its freeze: see the audit below."),
}
_SCORE = "the mean skill of all tasks; 1 is perfect"
_ARROWS = {"higher": ("↑", "higher is better"), "lower": ("↓", "lower is better")}


def verdict(run: RunFiles) -> str:
    """The audit's verdict over all ranks: `clean`, `violations`, `not finished` or `not proven`."""
    audits = [run.audit, *run.rank_audits.values()]
    if any(phase["violations"] for audit in audits for phase in audit["phases"]):
        return "violations"
    if not all(phase["completed"] for phase in run.audit["phases"]):
        return "not finished"
    return "clean" if run.audit["ok"] else "not proven"


def verdict_html(run: RunFiles) -> Html:
    word = verdict(run)
    return joined(["Audit: ", tag("b", word, class_=VERDICTS[word][0])])


def facts_html(run: RunFiles) -> Html:
    """The verdict and the few numbers that are asked for first."""
    best, spans = run.best, run.spans
    score = "never finite" if best is None else f"{best[SCORE]:.3f}"
    at = "" if best is None else f" at step {best['step']:,}"
    train_s = run.results.get("train_s", run.state.get("train_s"))
    sizes = run.data.get("images", {})
    trunk = run.config.get("trunk", {})
    facts: dict[str, Piece] = {
        "Verdict": verdict_html(run),
        "Best val/score": joined([score, tag("span", at, class_="note")]),
        "Trained": count(spans[-1].end if spans else 0, "step"),
        "Time": seconds(train_s),
        "Trunk": str(trunk.get("name", "not recorded")) if isinstance(trunk, Mapping) else str(trunk),
        "Images": f"{sizes['train']:,} + {sizes['val']:,} val" if {"train", "val"} <= sizes.keys() else "not recorded",
    }
    return joined([definitions(facts), tag("p", VERDICTS[verdict(run)][1], class_="note")])


def results_html(run: RunFiles) -> Html:
    """The metrics of the trivial predictor, at the end of each phase, and of the best weights."""
    ended = [span for span in run.spans if span.scores]
    best = run.best or {}
    header: list[Piece] = ["task", "metric", "", "trivial", *(span.name for span in ended)]
    header.append(joined(["best", tag("br"), f"step {best['step']:,}"]) if best else "best")
    ends = [_score_at(run, span.end, span.name) for span in ended]
    rows = [result_row(["all", "val/score", "higher"], [0.0, *ends, best.get(SCORE)], "main")]
    for task, metrics in run.metrics.items():
        for place, metric in enumerate(metrics):
            values = [
                run.trivial.get(task, {}).get(metric),
                *(span.scores.get(task, {}).get(metric) for span in ended),
                best.get(f"val/{task}/{metric}"),
            ]
            is_main = metric == run.main_metric(task)
            classes = " ".join(name for name, holds in (("main", is_main), ("first", not place)) if holds)
            rows.append(result_row([task, metric, run.direction(task, metric)], values, classes))
    inner = tag("table", tag("caption", "Results"), results_head(header), tag("tbody", *rows))
    box = tag("div", inner, class_="scroll", tabindex="0", role="region", aria_label="Results")
    note = (
        "Each phase as it ended, and the weights with the best val/score. The best value of a row is green; a task's"
        " main metric, which counts in val/score, is bold. Trivial: one constant output for every image."
    )
    missing = "" if run.trivial else " This run recorded no trivial predictor and no directions."
    chart = line_chart(SCORE, [ChartLine(SCORE, points(run.validations, SCORE))], run.spans, _SCORE, ("trivial", 0.0))
    return joined([tag("div", box, chart, class_="split"), tag("p", note + missing, class_="note")])


def results_head(header: Sequence[Piece]) -> Html:
    cells = [
        tag("th", hidden("direction") if at == 2 else title, scope="col", class_=None if at < 3 else "num mark")
        for at, title in enumerate(header)
    ]
    return tag("thead", tag("tr", *cells))


def result_row(key: Sequence[str | None], values: Sequence[float | None], classes: str) -> Html:
    task, metric, direction = key
    arrow, meaning = _ARROWS.get(direction or "", ("", "direction not known"))
    marked = best_of(values, direction)
    cells = [
        tag("td", number(value), hidden(" (best)") if at in marked else None, class_=mark(at in marked))
        for at, value in enumerate(values)
    ]
    return tag(
        "tr",
        tag("th", task, scope="row"),
        tag("th", metric, scope="row"),
        tag("td", tag("span", arrow, aria_hidden="true"), hidden(meaning), title=meaning),
        *cells,
        class_=classes or None,
    )


def mark(is_best: bool) -> str:
    """The class of a number's cell."""
    return "num best" if is_best else "num mark"


def best_of(values: Sequence[float | None], direction: str | None) -> set[int]:
    """The places of the best values; none where it is not known which are better, or there is nothing to compare."""
    known = {at: value for at, value in enumerate(values) if value is not None and math.isfinite(value)}
    if direction is None or len(known) < 2:
        return set()
    best = (max if direction == "higher" else min)(known.values())
    return {at for at, value in known.items() if value == best}


def _score_at(run: RunFiles, step: int, phase: str) -> float | None:
    rows = [row for row in run.validations if row["phase"] == phase and row["step"] == step]
    found: float | None = rows[-1][SCORE] if rows else None
    return found


def audit_rows(runs: Mapping[str, RunFiles]) -> list[list[Piece]]:
    """A row for each run: verdict, frozen tensors, checks, violations, hazards."""
    rows: list[list[Piece]] = []
    for label, run in runs.items():
        phases: list[dict[str, Any]] = run.audit["phases"]
        checks = sum(phase["checks"]["tripwires"] + phase["checks"]["fingerprints"] for phase in phases)
        frozen = ", ".join(f"{phase['name']}: {phase['frozen']['count']}" for phase in phases)
        found = sum(len(phase["violations"]) for phase in phases)
        hazards = sum(len(phase.get("hazards", ())) for phase in phases)
        cells: list[Piece] = [tag("td", tag("b", verdict(run), class_=VERDICTS[verdict(run)][0]))]
        rows.append([label, *cells, tag("td", frozen or DASH), f"{checks:,}", str(found), str(hazards)])
    return rows


def audits_table(runs: Mapping[str, RunFiles]) -> Html:
    titles = ["run", left_title("verdict"), left_title("frozen tensors"), "checks", "violations", "hazards"]
    return table("The audit of each run", titles, audit_rows(runs))
