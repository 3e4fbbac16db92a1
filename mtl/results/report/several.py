"""Several runs next to each other: results, curves, audits, and how their configurations differ."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from mtl.results.report.chart import ChartLine, keys_html, line_chart, points
from mtl.results.report.markup import DASH, Html, Piece, code, joined, left_title, seconds, table, tag, text_cell
from mtl.results.report.page import page
from mtl.results.report.results import audits_table, result_row, results_head
from mtl.results.report.run import SCORE, RunFiles, flat, read_run
from mtl.runtime.files import write_text
from mtl.runtime.version import __version__

# They name the run, not what it does.
_OF_THE_CALL = ("name", "runs_dir", "resume", "resume_override")
# A value is shown up to here.
_MOST_LETTERS = 120


def write_several(run_dirs: Sequence[Path], file: Path) -> Path:
    """Writes a page that compares runs; only their files are read.

    Args:
        run_dirs: The directories of finished runs, no two the same.
        file: The page.

    Returns:
        The file.

    Raises:
        RunFileError: A file of a run is damaged.
        OSError: The page cannot be written.
    """
    runs = dict(zip(labels_of(run_dirs), map(read_run, run_dirs), strict=True))
    write_text(file, comparison_page(runs))
    return file


def labels_of(run_dirs: Sequence[Path]) -> list[str]:
    """The names of directories, or their paths where two have one name."""
    names = [folder.resolve().name for folder in run_dirs]
    return [
        name if names.count(name) == 1 else os.path.relpath(folder)
        for name, folder in zip(names, run_dirs, strict=True)
    ]


def comparison_page(runs: Mapping[str, RunFiles]) -> str:
    """The page of several runs, by label."""
    parts = {
        "results": ("Results", _results(runs)),
        "curves": ("Curves", _curves(runs)),
        "configuration": ("Differences of configuration", _differences(runs)),
        "audit": ("Audits", audits_table(runs)),
        "runs": ("Runs", _origins(runs)),
    }
    title = f"{len(runs)} runs compared"
    intro = tag("p", ", ".join(runs), class_="about")
    footer = f"mtl {__version__}. To write this page again: mtl report {' '.join(str(r.folder) for r in runs.values())}"
    return page(title, "mtl comparison", intro, parts, tag("p", footer))


def _results(runs: Mapping[str, RunFiles]) -> Html:
    """The metrics of each run's best weights; a gap where a run has no such task or metric."""
    best = {label: run.best or {} for label, run in runs.items()}
    rows = [result_row(["all", SCORE, "higher"], [row.get(SCORE) for row in best.values()], "main")]
    metrics: dict[str, dict[str, None]] = {}
    for run in runs.values():
        for task, own in run.metrics.items():
            metrics.setdefault(task, {}).update(dict.fromkeys(own))
    for task, names in metrics.items():
        for place, metric in enumerate(names):
            main = {run.main_metric(task) for run in runs.values()}
            direction = _direction(runs, task, metric)
            classes = " ".join(name for name, holds in (("main", metric in main), ("first", not place)) if holds)
            values = [row.get(f"val/{task}/{metric}") for row in best.values()]
            rows.append(result_row([task, metric, direction], values, classes))
    header: list[Piece] = ["task", "metric", "", *runs]
    inner = tag("table", tag("caption", "Results of each run"), results_head(header), tag("tbody", *rows))
    box = tag("div", inner, class_="scroll", tabindex="0", role="region", aria_label="Results of each run")
    note = (
        "Each run's weights with the best val/score; the best value of a row is green. A dash: the run has no such"
        " metric. val/score is the mean over a run's own tasks: it compares runs of the same tasks and data only."
    )
    return joined([box, tag("p", note, class_="note")])


def _direction(runs: Mapping[str, RunFiles], task: str, metric: str) -> str | None:
    """Which values are better; None where no run says so, or two contradict."""
    found = {run.direction(task, metric) for run in runs.values()} - {None}
    return found.pop() if len(found) == 1 else None


def _curves(runs: Mapping[str, RunFiles]) -> Html:
    """Every run as a line: the score and each task's main metric, then all other metrics."""
    numbers = {label: number for number, label in enumerate(runs)}
    keys: dict[str, bool] = {SCORE: True}
    for run in runs.values():
        for task, metrics in run.metrics.items():
            # An earlier version did not record which one stands for its task.
            main_metrics = {each.main_metric(task) for each in runs.values()} - {None}
            for metric in metrics:
                keys[f"val/{task}/{metric}"] = metric in main_metrics or not main_metrics
    charts = {
        key: line_chart(
            key.removeprefix("val/") if key != SCORE else key,
            [
                ChartLine(label, points(run.validations, key), numbers[label])
                for label, run in runs.items()
                if any(key in row for row in run.validations)
            ],
        )
        for key in keys
    }
    main = [chart for key, chart in charts.items() if keys[key]]
    others = [chart for key, chart in charts.items() if not keys[key]]
    more = None
    if others:
        more = tag("details", tag("summary", "All other metrics"), tag("div", *others, class_="charts"))
    return joined([keys_html(list(runs)), tag("div", *main, class_="charts"), more])


def _differences(runs: Mapping[str, RunFiles]) -> Html:
    """The keys whose values are not the same in all runs."""
    configs = {label: flat(run.config) for label, run in runs.items()}
    every = list(dict.fromkeys(key for config in configs.values() for key in config if key not in _OF_THE_CALL))
    rows = [
        [joined([code(key)]), *(text_cell(_shown(config.get(key))) for config in configs.values())]
        for key in every
        if len({config.get(key) for config in configs.values()}) > 1
    ]
    if not rows:
        return tag("p", "None but their names.")
    return table("Differences of configuration", ["key", *map(left_title, runs)], rows)


def _shown(value: str | None) -> str:
    if value is None:
        return DASH
    return value if len(value) <= _MOST_LETTERS else f"{value[:_MOST_LETTERS]}..."


def _origins(runs: Mapping[str, RunFiles]) -> Html:
    rows: list[list[Piece]] = []
    for label, run in runs.items():
        sessions = run.results.get("sessions", [])
        latest = sessions[-1] if sessions else run.state
        train_s = run.results.get("train_s", run.state.get("train_s"))
        rows.append(
            [
                label,
                f"{run.spans[-1].end if run.spans else 0:,}",
                seconds(train_s),
                text_cell(str(latest.get("machine", {}).get("processor") or DASH)),
                text_cell(code((latest.get("git_commit") or DASH)[:12])),
                text_cell(code(str(run.history.get("command") or DASH))),
            ]
        )
    header: list[Piece] = ["run", "steps", "time", *map(left_title, ("processor", "commit", "command"))]
    return table("Runs", header, rows)
