"""The report of a run: one HTML file with audit, metrics, example predictions, history and configuration."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mtl.checkpoint.load import load_checkpoint
from mtl.checkpoint.run_files import (
    AUDIT,
    CONFIG,
    HISTORY,
    METRICS,
    read_audit,
    read_config_text,
    read_history,
    read_metrics,
)
from mtl.data import Batch
from mtl.model.trunk import in_eval_mode
from mtl.optim.task_gradients import GradientAnalysis
from mtl.phases.setup import build_model_setup
from mtl.results.pictures import add_legend, picture_of
from mtl.results.unchanged_html import unchanged_html
from mtl.runtime.files import write_text
from mtl.runtime.tensors import is_sharded
from mtl.runtime.text import count
from mtl.tasks import Task
from mtl.training.history import History
from mtl.training.setup import RunSetup
from mtl.training.tracking.gradient_figure import draw_gradients, png_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NUM_EXAMPLES = 6
# Letters above one of the examples.
_LINE_LENGTH = 32


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0}"
    "td,th{padding:.2rem .8rem;border-bottom:1px solid #ddd;text-align:right}"
    "td:first-child,th:first-child,td:nth-child(2),th:nth-child(2){text-align:left}img{max-width:100%}"
    ".ok{color:#087f23}.broken{color:#b00020}"
)


def write_report(setup: RunSetup, run_dir: Path, picture: Path | None = None) -> Path:
    """Writes `report.html` into a run directory.

    Args:
        setup: The set-up of the run; its model is loaded with the run's best weights.
        run_dir: The directory of a finished run.
        picture: The file to save the report's picture to, if any.

    Returns:
        The file.

    Raises:
        RunFileError: A file of the run is damaged.
        CheckpointError: Its weights cannot be read.
        OSError: The page cannot be written.
    """
    rows, audit = read_metrics(run_dir / METRICS), read_audit(run_dir / AUDIT)
    # A run whose score never was a number has no best weights.
    which = "best" if (run_dir / "checkpoints" / "best").exists() else "last"
    if any(is_sharded(parameter) for parameter in setup.root.parameters()):
        # The other ranks have exited: build an unsharded model.
        trunk = setup.config.trunk.model_copy(update={"weights": "none"})
        own = build_model_setup(setup.config.with_changes(trunk=trunk), source=setup.source)
        own.root.to(setup.device)
        setup = replace(setup, model=own.model, root=own.root)
    state, _ = load_checkpoint(run_dir / "checkpoints" / which, setup.root)
    rounded = "none" if state["val/score"] is None else f"{state['val/score']:.3f}"
    figure = draw_run(setup, [row for row in rows if "val/score" in row])
    image = png_of(figure)
    if picture is not None:
        picture.write_bytes(image)
    name = escape(setup.config.name)
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{name}</title><style>{_STYLE}</style>"
        f"<h1>{name}</h1>{_audit_html(audit)}"
        f"<h2>Validation and examples</h2><p>Validation after every epoch; predictions of the {which} weights (step"
        f" {state['step']}, val/score {rounded}).</p>"
        f"{_img(image, 'validation metrics over steps, and example predictions')}"
        f"{gradients_html([row for row in rows if 'grad/unreached' in row])}"
        f"{history_html(run_dir)}"
        f"{unchanged_html(run_dir)}"
        f"<h2>Configuration</h2><pre>{escape(read_config_text(run_dir / CONFIG))}</pre></html>"
    )
    write_text(run_dir / "report.html", page)
    return run_dir / "report.html"


def _audit_html(audit: dict[str, Any]) -> str:
    unfinished = not all(phase["completed"] for phase in audit["phases"])
    bad = (
        "violations" if any(phase["violations"] for phase in audit["phases"]) else "not finished" if unfinished else ""
    )
    verdict = f'<b class="broken">{bad}</b>' if bad else '<b class="ok">clean</b>'
    head = "<tr><th>phase<th>freeze<th>frozen tensors<th>trained tensors<th>steps<th>checks<th>violations</tr>"
    body = "".join(
        f"<tr><td>{escape(phase['name'])}<td>{escape(', '.join(phase['freeze']) or '-')}<td>{phase['frozen']['count']}"
        f"<td>{phase['trainable']['changed']} of {phase['trainable']['count']}<td>{phase['checks']['steps']}"
        f"<td>{phase['checks']['tripwires'] + phase['checks']['fingerprints']:,}<td>{len(phase['violations'])}</tr>"
        for phase in audit["phases"]
    )
    found = "".join(
        f"<li>{escape(v['phase'])}, step {v['step']}: <code>{escape(v['name'])}</code> {escape(v['kind'])}:"
        f" {escape(v['detail'])}{_frozen_by(v)}; likely cause: {escape(v['cause'])}</li>"
        for phase in audit["phases"]
        for v in phase["violations"]
    )
    return f"<h2>Audit: {verdict}</h2><table>{head}{body}</table>" + (f"<ul>{found}</ul>" if found else "")


def _frozen_by(violation: Mapping[str, Any]) -> str:
    """The pattern that froze a tensor; reports of earlier runs do not have it."""
    pattern = violation.get("pattern")
    return f"; frozen by <code>{escape(pattern)}</code>" if pattern else ""


def history_html(run_dir: Path) -> str:
    """The command that started a run and the settings changed on resume; empty for a run without a history file."""
    file = run_dir / HISTORY
    if not file.is_file():
        return ""
    history = History.from_json(read_history(file))
    command = escape(history.command or "not known")
    origin = "" if history.origin is None else f"<p>Started from <code>{escape(history.origin)}</code>.</p>"
    rows = "".join(
        f"<tr><td>{change.step}<td><code>{escape(change.key)}</code><td>{escape(_value(change.old))}"
        f"<td>{escape(_value(change.new))}</tr>"
        for change in history.changes
    )
    head = "<tr><th>after step<th>key<th>before<th>since then</tr>"
    changes = f"<h2>Settings changed on resume</h2><table>{head}{rows}</table>" if rows else ""
    return f"<h2>Command</h2><pre>{command}</pre>{origin}{changes}"


def _value(value: Any) -> str:
    return "nothing" if value is None else str(value)


def _img(png: bytes, alt: str) -> str:
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def gradients_html(rows: list[dict[str, Any]]) -> str:
    """The last gradient analysis of every phase; empty if there is none."""
    if not rows:
        return ""
    last = {row["phase"]: row for row in rows}
    return (
        "<h2>Gradients</h2><p>Each task's gradient on the trainable depth groups of the trunk, on one batch. Two tasks"
        " are in conflict if the cosine of their gradients is below 0; their magnitude similarity is 2|a||b| / (|a|² +"
        " |b|²), 1 for gradients of one length (Yu et al. 2020, arXiv 2001.06782, Definitions 1 and 2).</p>"
        + "".join(_analysis_html(phase, row) for phase, row in last.items())
    )


def _analysis_html(phase: str, row: dict[str, Any]) -> str:
    analysis = GradientAnalysis.from_row(row)
    title = f"{phase}, step {row['step']}"
    unreached = row["grad/unreached"]
    note = f"<p>No task reaches {count(unreached, 'trainable depth group')}.</p>" if unreached else ""
    head = "<tr><th>task<th>task<th>cosine<th>magnitude similarity<th>conflict</tr>"
    body = "".join(
        f"<tr><td>{escape(pair.tasks[0])}<td>{escape(pair.tasks[1])}<td>{pair.cosine:.3f}"
        f"<td>{pair.magnitude_similarity:.3f}<td>{'yes' if pair.conflicts else 'no'}</tr>"
        for pair in analysis.pairs
    )
    pairs = f"<table>{head}{body}</table>" if body else ""
    return f"<h3>{escape(title)}</h3>{_img(png_of(draw_gradients(analysis)), f'gradients of {title}')}{note}{pairs}"


def draw_run(setup: RunSetup, epochs: list[dict[str, Any]]) -> Figure:
    """Draws each task's main metric over the phases, above example predictions.

    Args:
        setup: The run's setup, the model with the weights to show.
        epochs: Rows of `metrics.jsonl` with validation metrics.
    """
    from matplotlib.figure import Figure

    dense = {name: task for name, task in setup.labelled.items() if task.output == "dense"}
    figure = Figure(figsize=(11, 3 + 1.6 * (1 + 2 * len(dense))), layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=[3, 1.6 * (1 + 2 * len(dense))])[:, 0]
    for axes, (name, task) in zip(
        above.subplots(1, len(setup.labelled), squeeze=False)[0], setup.labelled.items(), strict=True
    ):
        _draw_metric(axes, name, task, epochs)
    batch, outputs = _predict(setup)
    grid = below.subplots(1 + 2 * len(dense), _NUM_EXAMPLES, squeeze=False)
    pictures = [("image", picture_of(batch.images))]
    for name, task in dense.items():
        pictures += [(f"{name}\ntruth", task.draw(batch.labels[name], is_label=True))]
        pictures += [(f"{name}\npredicted", task.draw(outputs[name], is_label=False))]
    for axes_row, (title, images) in zip(grid, pictures, strict=True):
        axes_row[0].set_ylabel(title, fontsize=8)
        for axes, image in zip(axes_row, images.numpy(), strict=False):
            axes.imshow(image, cmap="gray" if image.shape[-1] == 1 else None)
    texts = {
        name: (task.caption(outputs[name], is_label=False), task.caption(batch.labels[name], is_label=True))
        for name, task in setup.labelled.items()
        if name not in dense
    }
    for i, axes in enumerate(grid[0][: len(batch)]):
        lines = [_said(name, predicted[i], truth[i]) for name, (predicted, truth) in texts.items()]
        axes.set_title("\n".join(lines), fontsize=8)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    add_legend(below, dense, figure.get_figwidth())
    return figure


def _said(name: str, predicted: str, truth: str) -> str:
    """A prediction in words, in two lines if one would reach into the next picture's."""
    first, second = f"{name}: {predicted}", f"(truth {truth})"
    return f"{first}{' ' if len(first) + len(second) < _LINE_LENGTH else chr(10)}{second}"


def _draw_metric(axes: Axes, name: str, task: Task, epochs: list[dict[str, Any]]) -> None:
    key = f"val/{name}/{task.goal.metric}"
    steps = [row["step"] for row in epochs]
    axes.plot(steps, [row[key] for row in epochs], marker="o", color="tab:blue")
    phases = list(dict.fromkeys(row["phase"] for row in epochs))
    begin = 0
    for number, phase in enumerate(phases):
        end = max(row["step"] for row in epochs if row["phase"] == phase)
        axes.axvspan(begin, end, color="tab:orange" if number % 2 else "tab:gray", alpha=0.12, label=phase)
        begin = end
    better = "up" if task.goal.direction == "higher" else "down"
    axes.set_title(f"{name}: {task.goal.metric} ({better} is better)")
    axes.title.set_fontsize(9)
    axes.set_xlabel("step")
    # More names than these would hide the curve; they are in the table above. A run that was killed early has none.
    if 0 < len(phases) <= 6:
        # Without a place of its own, matplotlib warns where the machine is slow.
        axes.legend(fontsize=7, loc="best")


def _predict(setup: RunSetup) -> tuple[Batch, dict[str, Tensor]]:
    batch = setup.val.batch(setup.val.examples(_NUM_EXAMPLES))
    with in_eval_mode(setup.model), torch.no_grad():
        outputs = setup.model(batch.images.to(setup.device))
    return batch, {name: output.float().cpu() for name, output in outputs.items()}
