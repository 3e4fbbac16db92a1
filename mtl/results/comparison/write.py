"""Writes a comparison: tables, a figure, and one page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mtl.results.comparison.collect import Comparison
from mtl.results.comparison.table import (
    PAIRED_HEAD,
    as_csv,
    head,
    latex,
    markdown,
    notes,
    paired_rows,
    points,
    rows,
)
from mtl.results.report.markup import Html, code, joined, table, tag
from mtl.results.report.page import page
from mtl.runtime.files import write_bytes, write_text
from mtl.runtime.version import __version__

FILES = ("comparison.md", "comparison.tex", "comparison.csv", "comparison.png", "report.html")


def write_all(folder: Path, found: Comparison, command: str) -> list[Path]:
    """Writes the files of a comparison, each whole.

    Args:
        folder: That of the comparison.
        found: Its numbers.
        command: The command that makes it.

    Raises:
        OSError: One cannot be written.
    """
    figure = _figure(found)
    picture, drawing = io.BytesIO(), io.StringIO()
    figure.savefig(picture, format="png", dpi=150)
    figure.savefig(drawing, format="svg")
    files = [folder / name for name in FILES]
    for file, content in zip(files, (markdown(found), latex(found), as_csv(found)), strict=False):
        write_text(file, content)
    write_bytes(files[3], picture.getvalue())
    write_text(files[4], _page(found, drawing.getvalue(), command))
    return files


def _figure(found: Comparison) -> Figure:
    """A panel for each main metric: the runs of each method as dots, their mean as a line."""
    panels: dict[str, list[tuple[str, list[float], float]]] = {}
    for title, method, values, mean in points(found):
        panels.setdefault(title, []).append((method, values, mean))
    names = [method.name for method in found.methods]
    figure = Figure(figsize=(2.2 * len(panels) + 1.6, 0.36 * len(names) + 1.1), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for place, (_, values, mean) in enumerate(lines):
            axis.plot(values, [place] * len(values), "o", color="C0", alpha=0.5, markersize=4)
            axis.plot([mean, mean], [place - 0.3, place + 0.3], color="C0", linewidth=2)
        axis.set_title(title, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.grid(axis="x", linewidth=0.3)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    return figure


def _page(found: Comparison, drawing: str, command: str) -> str:
    runs = sorted({run.folder.name for run in found.every})
    parts = {
        "results": ("Results", joined([table("Results", head(found), rows(found)), _list(notes(found))])),
        "figure": ("Runs by seed", Html(drawing[drawing.index("<svg") :])),
        "paired": ("Paired differences", table("Paired differences", PAIRED_HEAD, paired_rows(found), keys=2)),
        "runs": ("Runs", _list(runs)),
    }
    names = ", ".join(method.name for method in found.methods)
    footer = tag("p", f"mtl {__version__}. ", code(command))
    return page("A comparison", "mtl comparison", tag("p", names, class_="about"), parts, footer)


def _list(lines: Sequence[str]) -> Html:
    return tag("ul", *(tag("li", line) for line in lines))
