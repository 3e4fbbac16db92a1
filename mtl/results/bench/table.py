"""The measurements of `mtl bench`, as tables and as a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from mtl.results.bench.bench import Bench
from mtl.results.bench.measure import BenchRow, Time
from mtl.runtime.layout import table
from mtl.runtime.text import in_bytes

_PARTS: dict[str, tuple[Time, Time]] = {"train": ("train_s", "train_cpu_s"), "epoch": ("epoch_s", "epoch_cpu_s")}


def in_words(found: Bench, width: int | None = None) -> str:
    """The machine, then a table for each setting, with the kinds of phases as columns."""
    settings = dict.fromkeys(row.setting for row in found.rows)
    tables = [_setting_table(name, [row for row in found.rows if row.setting == name], width) for name in settings]
    notes = [*found.missing, *dict.fromkeys(row.tracking for row in found.rows if row.tracking)]
    return "\n\n".join([_machine_line(found.machine), *tables, *(["\n".join(notes)] if notes else [])])


def _machine_line(on: Mapping[str, Any]) -> str:
    where = [on["gpu"]] if on["gpu"] else []
    where += [on["processor"] or on["system"], f"{on['cores']} cores", f"{on['threads']} threads"]
    versions = [f"{name} {number}" for name, number in on["versions"].items()]
    return f"{', '.join(where)}\n{', '.join(versions)}\nruns in {on['folder']}; medians of an epoch's seconds"


def _setting_table(setting: str, rows: Sequence[BenchRow], width: int | None) -> str:
    cells = [[name, *map(cell, rows)] for name, cell in _measures(list(rows[0].loops))]
    return f"{setting}\n{table(['', *(row.phase for row in rows)], cells, range(1, 1 + len(rows)), width)}"


def _measures(names: Sequence[str]) -> Iterator[tuple[str, Callable[[BenchRow], str]]]:
    """The lines of a table: the title of each, and its cell for a row, of loops of these names."""
    yield "steps", lambda row: str(row.num_steps)
    others = [name for name in names if name != "limit"]
    for part, (clock, cpu) in _PARTS.items():
        for name in names:
            yield f"{part}, {name}", lambda row, name=name, time=clock: f"{row.loops[name].median(time):.3f} s"  # type: ignore[misc]
        for name in others:
            yield f"{part}, {name}/limit", lambda row, name=name, time=clock: f"{row.over_limit(name, time):.2f}"  # type: ignore[misc]
        yield f"{part}, mtl/limit, CPU", lambda row, time=cpu: f"{row.over_limit('mtl', time):.2f}"  # type: ignore[misc]
    for name in names:
        yield f"first, {name}", lambda row, name=name: f"{row.loops[name].first_s:.3f} s"  # type: ignore[misc]
    yield "audit", lambda row: f"{row.audit_share:.1%}"
    for name in names:
        yield f"memory, {name}", lambda row, name=name: in_bytes(row.loops[name].peak_bytes)  # type: ignore[misc]


def draw(found: Bench) -> Figure:
    """Seconds of the training part and of the whole epoch as bars."""
    settings = list(dict.fromkeys(row.setting for row in found.rows))
    figure = Figure(figsize=(5 * len(settings), 8), layout="constrained")
    panels = figure.subplots(2, len(settings), squeeze=False)
    for line, (part, (time, _)) in zip(panels, _PARTS.items(), strict=True):
        for axes, setting in zip(line, settings, strict=True):
            own = [row for row in found.rows if row.setting == setting]
            names = list(own[0].loops)
            width = 0.8 / len(names)
            for place, name in enumerate(names):
                at = [number + width * (place - (len(names) - 1) / 2) for number in range(len(own))]
                axes.bar(at, [row.loops[name].median(time) for row in own], 0.9 * width, label=name)
            axes.set_xticks(range(len(own)), [row.phase.replace("_", " ") for row in own], fontsize=8)
            axes.set_title(setting, fontsize=9)
            axes.set_ylabel("seconds, training part" if part == "train" else "seconds, whole epoch")
            axes.legend(fontsize=8)
    return figure
