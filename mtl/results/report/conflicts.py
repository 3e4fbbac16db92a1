"""How the tasks' gradients on the trunk relate, over all analyses of a phase: medians, and how far they spread."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from mtl.optim.task_gradients import GradientAnalysis
from mtl.results.report.markup import DASH, Html, Piece, hidden, joined, scrolling, signed, tag
from mtl.results.report.palette import MOST_HEAT
from mtl.results.report.run import RunFiles
from mtl.runtime.text import count

# Numbers of all phases together, so that a page stays below 2 MB.
_MOST_CELLS = 6000
# A plot of more pairs than these would be a wall.
_MOST_PAIRS = 24
_ROW, _LEFT, _WIDTH = 18.0, 140.0, 370.0
_TOP, _BOTTOM = 6.0, 20.0

_INTRO = (
    "Each task's gradient on the trainable depth groups of the trunk, on one batch at each analysis. Two tasks are in"
    " conflict where the cosine of their gradients is below 0 (Yu et al. 2020, arXiv 2001.06782, Definition 1); their"
    " magnitude similarity is 2|a||b| / (|a|² + |b|²), 1 for gradients of one length (Definition 2)."
)
_NO_SPREAD = "One analysis has no spread: a lower audit.gradients_every_steps analyses more often."


@dataclass(frozen=True)
class Spread:
    """A number over several analyses.

    Attributes:
        median: Of those that are finite; NaN if none is.
        low: The least of them.
        high: The greatest.
        num: How many there are.
    """

    median: float
    low: float
    high: float
    num: int

    def __str__(self) -> str:
        if not self.num:
            return "not defined"
        return f"{signed(self.median, 2)}" + (
            f" ({signed(self.low, 2)} to {signed(self.high, 2)})" if self.num > 1 else ""
        )


def spread_of(values: Sequence[float]) -> Spread:
    own = [value for value in values if math.isfinite(value)]
    return Spread(median(own), min(own), max(own), len(own)) if own else Spread(math.nan, math.nan, math.nan, 0)


def conflicts_html(run: RunFiles) -> Html:
    """A part for each phase of which gradients were analysed; empty if there is none."""
    by_phase: dict[str, list[dict[str, Any]]] = {}
    for row in run.rows:
        if "grad/unreached" in row:
            by_phase.setdefault(row["phase"], []).append(row)
    if not by_phase:
        return Html()
    shown, left, num_cells = list[Html](), list[str](), 0
    for name, rows in by_phase.items():
        num_cells += max(len(row) for row in rows)
        if num_cells <= _MOST_CELLS:
            shown.append(_phase(name, rows))
        else:
            left.append(name)
    note = tag("p", f"Left out, see metrics.jsonl: {', '.join(left)}.", class_="note") if left else None
    return joined([tag("p", _INTRO, class_="note"), *shown, note])


def _phase(name: str, rows: Sequence[dict[str, Any]]) -> Html:
    analyses = [GradientAnalysis.from_row(row) for row in rows]
    steps = f"step {rows[0]['step']:,}" + (f" to {rows[-1]['step']:,}" if len(rows) > 1 else "")
    pieces: list[Piece] = [tag("h3", f"{name}: {len(rows)} {'analysis' if len(rows) == 1 else 'analyses'}, {steps}")]
    if len(rows) == 1:
        pieces.append(tag("p", _NO_SPREAD, class_="note"))
    if unreached := max(row["grad/unreached"] for row in rows):
        pieces.append(tag("p", f"No task reaches {count(unreached, 'trainable depth group')}."))
    cosines = pair_spreads(analyses)
    if cosines:
        pieces += [_matrix(cosines, name), _strips(analyses, cosines)]
    return joined([*pieces, _norms(analyses, name)])


def pair_spreads(analyses: Sequence[GradientAnalysis]) -> dict[tuple[str, str], Spread]:
    """The cosines of every two tasks over some analyses."""
    found: dict[tuple[str, str], list[float]] = {}
    for analysis in analyses:
        for pair in analysis.pairs:
            found.setdefault(pair.tasks, []).append(pair.cosine)
    return {tasks: spread_of(values) for tasks, values in found.items()}


def _matrix(cosines: Mapping[tuple[str, str], Spread], phase: str) -> Html:
    tasks = list(dict.fromkeys(task for pair in cosines for task in pair))
    rows = [
        tag("tr", tag("th", one, scope="row"), *(_cosine_cell(cosines, one, other) for other in tasks)) for one in tasks
    ]
    titles = [tag("th", hidden("task"), scope="col"), *(tag("th", task, scope="col") for task in tasks)]
    label = f"Cosine of gradients in {phase}: median, and the range over all analyses"
    inner = tag("table", tag("caption", label), tag("thead", tag("tr", *titles)), tag("tbody", *rows), class_="heat")
    return joined([tag("p", "Cosine: median, and its range below.", class_="note"), scrolling(inner, label)])


def _cosine_cell(cosines: Mapping[tuple[str, str], Spread], one: str, other: str) -> Html:
    if one == other:
        return tag("td", hidden("the same task"))
    spread = cosines.get((one, other), cosines.get((other, one)))
    if spread is None or not spread.num:
        return tag("td", DASH, hidden("not defined"))
    share = MOST_HEAT * min(1.0, abs(spread.median))
    small = tag("small", f"{signed(spread.low, 2)} to {signed(spread.high, 2)}") if spread.num > 1 else None
    sign = "warm" if spread.median < 0 else "cold"
    return tag("td", f"{signed(spread.median, 2)}", small, class_=sign, style=f"--share:{share:.0%}")


def _strips(analyses: Sequence[GradientAnalysis], cosines: Mapping[tuple[str, str], Spread]) -> Html:
    """A row for each pair: every analysis as a dot, the range as a bar, the median as a tick; lowest median first."""
    known = {pair: spread for pair, spread in cosines.items() if spread.num}
    order = sorted(known, key=lambda pair: known[pair].median)[:_MOST_PAIRS]
    if not order:
        return Html()
    low = min(-0.1, *(known[pair].low for pair in order))
    high = max(0.1, *(known[pair].high for pair in order))
    height = _TOP + _ROW * len(order) + _BOTTOM

    def x(value: float) -> str:
        return f"{_LEFT + (_WIDTH - _LEFT - 14) * (value - low) / (high - low):.1f}"

    pieces = [tag("line", x1=x(0), x2=x(0), y1=_TOP, y2=height - _BOTTOM, class_="zero")]
    pieces += [
        tag("text", f"{signed(value, 2)}", x=x(value), y=height - 6, text_anchor=anchor)
        for value, anchor in ((low, "start"), (0.0, "middle"), (high, "end"))
        if value == 0 or abs(value) > (high - low) / 8
    ]
    for number, pair in enumerate(order):
        y, spread = _TOP + _ROW * (number + 0.5), known[pair]
        colour = 1 if spread.median < 0 else 0
        values = [each.cosine for analysis in analyses for each in analysis.pairs if each.tasks == pair]
        pieces += [
            tag(
                "text",
                _clipped(" · ".join(pair)),
                x=_LEFT - 10,
                y=y + 3.5,
                text_anchor="end",
                class_="name",
            ),
            tag("line", x1=x(spread.low), x2=x(spread.high), y1=y, y2=y, class_=f"line line-{colour}"),
            *(tag("circle", cx=x(v), cy=y, r="2.2", class_=f"dot-{colour}") for v in values if math.isfinite(v)),
            tag("line", x1=x(spread.median), x2=x(spread.median), y1=y - 5, y2=y + 5, class_=f"line line-{colour}"),
        ]
    words = "; ".join(f"{' and '.join(pair)} {known[pair]}" for pair in order)
    svg = tag("svg", tag("title", f"Cosines: {words}"), *pieces, viewBox=f"0 0 {_WIDTH:g} {height:g}", role="img")
    left = len(known) - len(order)
    small = "each analysis, their range and median; lowest median first" + (f"; {left} more pairs" if left else "")
    return tag("figure", tag("figcaption", "Cosine of every two tasks", tag("small", small)), svg, class_="strips")


def _norms(analyses: Sequence[GradientAnalysis], phase: str) -> Html:
    """log10 of each task's norm by depth group, the median over the analyses."""
    tasks = list(dict.fromkeys(task for analysis in analyses for task in analysis.norms))
    groups = sorted({group for analysis in analyses for group in analysis.groups})
    logs = {
        (task, group): spread_of([math.log10(norm) for norm in _reached(analyses, task, group) if norm > 0])
        for task in tasks
        for group in groups
    }
    medians = [spread.median for spread in logs.values() if spread.num]
    low, high = min(medians, default=0.0), max(medians, default=1.0)
    rows = [
        tag("tr", tag("th", group, scope="row"), *(_norm_cell(logs[task, group], low, high) for task in tasks))
        for group in groups
    ]
    titles = [tag("th", "depth group", scope="col"), *(tag("th", task, scope="col") for task in tasks)]
    label = f"log10 of the gradient's norm in {phase}, by task and depth group"
    inner = tag("table", tag("caption", label), tag("thead", tag("tr", *titles)), tag("tbody", *rows), class_="heat")
    summary = tag("summary", "Norms by depth group (log10, median and range)")
    return tag("details", summary, scrolling(inner, label)) if groups else Html()


def _reached(analyses: Sequence[GradientAnalysis], task: str, group: str) -> list[float]:
    own = [analysis for analysis in analyses if group in analysis.reached.get(task, ())]
    return [analysis.norms[task][group] for analysis in own]


def _norm_cell(spread: Spread, low: float, high: float) -> Html:
    if not spread.num:
        return tag("td", DASH, hidden("not reached, zero or not finite"))
    share = MOST_HEAT * (spread.median - low) / (high - low or 1)
    small = tag("small", f"{signed(spread.low, 1)} to {signed(spread.high, 1)}") if spread.num > 1 else None
    return tag("td", f"{signed(spread.median, 1)}", small, class_="cold", style=f"--share:{share:.0%}")


def _clipped(text: str) -> str:
    return text if len(text) <= 26 else f"{text[:25]}…"
