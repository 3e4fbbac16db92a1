"""Pictures of a gradient analysis: who pulls how hard where, and who pulls against whom."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

from mtl.optim.task_gradients import GradientAnalysis

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_gradients(analysis: GradientAnalysis) -> Figure:
    """Draws two heat maps: log10 of the norm by task and group, and the cosine of every two tasks.

    A cell without colour says why: `-` is not reached, `0` reached by a gradient of zero, `nan` not finite.
    """
    from matplotlib.figure import Figure

    tasks, groups = list(analysis.norms), list(analysis.groups)
    size = (3.5 + 0.4 * len(groups) + 0.7 * len(tasks), 2.4 + 0.4 * len(tasks))
    figure = Figure(figsize=size, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2 + 0.4 * len(groups), 2 + 0.7 * len(tasks)])
    norms = [[analysis.norms[task][group] for group in groups] for task in tasks]
    words = [
        [_word(norm) if group in analysis.reached[task] else "-" for group, norm in zip(groups, row, strict=True)]
        for task, row in zip(tasks, norms, strict=True)
    ]
    logs = [[math.log10(norm) if norm > 0 else math.nan for norm in row] for row in norms]
    _draw_map(left, logs, words, groups, tasks, "viridis", None)
    left.set_title("log10 of the gradient's norm", fontsize=9)
    cosines = {pair.tasks: pair.cosine for pair in analysis.pairs}
    table = [[1.0 if a == b else cosines.get((a, b), cosines.get((b, a), math.nan)) for a in tasks] for b in tasks]
    cosine_words = [["" if a == b else f"{value:.2f}" for a, value in enumerate(row)] for b, row in enumerate(table)]
    _draw_map(right, table, cosine_words, tasks, tasks, "RdBu", 1.0)
    right.set_title("cosine; below 0 is a conflict", fontsize=9)
    return figure


def png_of(figure: Figure, dpi: int = 110) -> bytes:
    """A figure as the content of a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi)
    return file.getvalue()


def _word(norm: float) -> str:
    return f"{math.log10(norm):.1f}" if norm > 0 else "0" if norm == 0 else "nan"


def _draw_map(
    axes: Axes,
    values: Sequence[Sequence[float]],
    words: Sequence[Sequence[str]],
    columns: Sequence[str],
    rows: Sequence[str],
    colours: str,
    limit: float | None,
) -> None:
    """Draws numbers as colours with a word on each; `limit` is where the colours end on both sides of 0."""
    if not columns:
        axes.set_axis_off()
        return
    # Without a number anywhere there is no range of colours to find.
    finite = [value for row in values for value in row if math.isfinite(value)] or [0.0]
    low, high = (min(finite), max(finite)) if limit is None else (-limit, limit)
    axes.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto")
    middle = (low + high) / 2
    for y, row in enumerate(words):
        for x, word in enumerate(row):
            # viridis is dark at its low end, the diverging map at both.
            value = values[y][x]
            is_dark = value < middle if limit is None else abs(value) > 0.6 * limit
            axes.text(x, y, word, ha="center", va="center", fontsize=6, color="white" if is_dark else "black")
    axes.set_xticks(range(len(columns)), columns, rotation=60, ha="right", fontsize=7)
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
