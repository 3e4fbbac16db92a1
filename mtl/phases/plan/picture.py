"""The plan of a run as a picture: parameters from top to bottom, phases from left to right, lengths to scale."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from mtl.phases.plan.records import PhasePlan, Plan
from mtl.runtime.text import count

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FROZEN, _TRAINED, _UNREACHED, _IDLE = "#c9d3df", "#d1603d", "#e9c46a", "#f4f4f4"
# A phase of few steps, or one that only evaluates, is drawn this wide at least, as a share of the whole.
_NARROWEST = 0.02


def draw_plan(plan: Plan, file: Path) -> None:
    """Draws which parameters each phase trains.

    Args:
        plan: The plan.
        file: Where the picture goes; its ending says in which format (png, svg, pdf).

    Raises:
        ValueError: matplotlib knows no such format.
        OSError: The file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    modules = _modules(plan)
    figure = Figure(figsize=(10, 2.2 + 0.22 * len(modules)), layout="constrained")
    formats = figure.canvas.get_supported_filetypes()
    if file.suffix.lstrip(".").lower() not in formats:
        raise ValueError(f"expected a name that ends in one of .{', .'.join(sorted(formats))}")
    axes = figure.add_subplot()
    edges = _edges(plan)
    _draw_cells(axes, plan, edges)
    starts = list(accumulate((number for _, number in modules), initial=0))
    # A label needs an eighth of an inch; those that would overprint the one above are left out.
    room = len(plan.parameters) / (8 * (figure.get_figheight() - 2))
    places = [(start + number / 2, name) for start, (name, number) in zip(starts, modules, strict=False)]
    shown = [places[0]]
    shown += [place for before, place in pairwise(places) if place[0] - before[0] >= room]
    axes.set_yticks([place for place, _ in shown])
    axes.set_yticklabels([name for _, name in shown], fontsize=7)
    for start in starts:
        axes.axhline(start, color="white", linewidth=0.8)
    for edge in edges:
        axes.axvline(edge, color="black", linewidth=0.8)
    centres = [(left + right) / 2 for left, right in pairwise(edges)]
    axes.set_xticks(centres)
    turned = 60 if min(right - left for left, right in pairwise(edges)) < edges[-1] / 8 else 0
    labels = [f"{phase.name}{', ' if turned else chr(10)}{_length(phase)}" for phase in plan.phases]
    axes.set_xticklabels(labels, rotation=turned, ha="right" if turned else "center", fontsize=7)
    axes.set(xlim=(0, edges[-1]), ylim=(len(plan.parameters), 0))
    axes.set_title(f"{plan.trunk}: what each phase trains", fontsize=10)
    axes.tick_params(length=0)
    legend = [("trained", _TRAINED), ("frozen", _FROZEN), ("reached by no active task", _UNREACHED)]
    legend += [("stepped by the balancing method itself", _IDLE)] if _IDLE in _used(plan) else []
    figure.legend(
        handles=[Patch(color=color, label=label) for label, color in legend],
        loc="outside lower center",
        ncols=len(legend),
    )
    figure.savefig(file, dpi=130)


def _draw_cells(axes: Axes, plan: Plan, edges: list[float]) -> None:
    from matplotlib.colors import ListedColormap

    colors = [_FROZEN, _TRAINED, _UNREACHED, _IDLE]
    columns = [_column(phase, plan.parameters) for phase in plan.phases]
    cells = [[colors.index(column[row]) for column in columns] for row in range(len(plan.parameters))]
    rows = list(range(len(plan.parameters) + 1))
    axes.pcolormesh(edges, rows, cells, cmap=ListedColormap(colors), vmin=0, vmax=len(colors) - 1)


def _used(plan: Plan) -> set[str]:
    return {color for phase in plan.phases for color in _column(phase, plan.parameters)}


def _length(phase: PhasePlan) -> str:
    if phase.optimizer is None:
        return "evaluation"
    return f"{'at most ' if phase.length.startswith('until') else ''}{count(phase.num_steps, 'step')}"


def _column(phase: PhasePlan, names: Sequence[str]) -> list[str]:
    colors = dict.fromkeys(phase.frozen.names, _FROZEN) | dict.fromkeys(phase.lr_of, _TRAINED)
    colors |= dict.fromkeys(phase.unreached, _UNREACHED)
    return [colors.get(name, _IDLE) for name in names]


def _edges(plan: Plan) -> list[float]:
    """Where each phase begins, and where the last one ends, in steps; short ones are widened to be seen."""
    total = sum(phase.num_steps for phase in plan.phases) or len(plan.phases)
    return list(accumulate((max(phase.num_steps, _NARROWEST * total) for phase in plan.phases), initial=0.0))


def _modules(plan: Plan, most: int = 40) -> list[tuple[str, int]]:
    """The parameters in runs that share a module, as deep in the tree as there is room for labels."""
    runs: list[tuple[str, int]] = []
    for depth in range(6, 0, -1):
        runs = []
        for name in plan.parameters:
            module = ".".join(name.split(".")[:-1][:depth])
            if runs and runs[-1][0] == module:
                runs[-1] = (module, runs[-1][1] + 1)
            else:
                runs.append((module, 1))
        if len(runs) <= most:
            break
    return runs
