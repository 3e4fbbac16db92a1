"""From a run directory to its `report.html`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mtl.checkpoint.load import load_checkpoint
from mtl.phases.setup import build_model_setup
from mtl.results.report.conflicts import conflicts_html
from mtl.results.report.curves import curves_html
from mtl.results.report.dividend import dividend_html
from mtl.results.report.freeze_map import freeze_map_html
from mtl.results.report.markup import Html, joined, tag
from mtl.results.report.origin import configuration_html, origin_html
from mtl.results.report.page import page
from mtl.results.report.predictions import predict, predictions_html
from mtl.results.report.proof import proof_html
from mtl.results.report.results import facts_html, results_html
from mtl.results.report.run import RunFiles, read_run
from mtl.results.report.taken_over import taken_over_html
from mtl.results.report.timeline import timeline_html
from mtl.runtime.files import write_text
from mtl.runtime.tensors import is_sharded
from mtl.runtime.version import __version__
from mtl.training.setup import RunSetup
from mtl.training.tracking.record import task_goals


def write_report(setup: RunSetup, run_dir: Path, picture: Path | None = None, file: Path | None = None) -> Path:
    """Writes the report of a run.

    Args:
        setup: The set-up of the run; its model is loaded with the run's best weights.
        run_dir: The directory of a finished run.
        picture: The PNG file for a picture of the run, if any.
        file: Where the report goes; `report.html` in the run directory if not given.

    Returns:
        The file.

    Raises:
        RunFileError: A file of the run is damaged.
        CheckpointError: Its weights cannot be read.
        OSError: The page cannot be written.
    """
    run = read_run(run_dir)
    run = run.with_setup({"tasks": task_goals(setup), "trivial": setup.trivial}, setup.plan.to_json())
    setup, state, which = _with_weights(setup, run_dir)
    batch, outputs = predict(setup)
    score = "none" if state["val/score"] is None else f"{state['val/score']:.3f}"
    note = f"Validation images; predictions of the {which} weights (step {state['step']:,}, val/score {score})."
    predictions = predictions_html(batch, outputs, setup.labelled, note)
    if picture is not None:
        from mtl.results.report.picture import draw_run
        from mtl.training.tracking.gradient_figure import png_of

        picture.write_bytes(png_of(draw_run(setup, run.validations)))
    file = file or run_dir / "report.html"
    write_text(file, run_page(run, predictions))
    return file


def run_page(run: RunFiles, predictions: Html) -> str:
    """The page of one run: what came out first, then how, then proof and origin.

    Args:
        run: What its files hold.
        predictions: The part of which the model was needed; empty without one.
    """
    taken = taken_over_html(run)
    parts: Mapping[str, tuple[str, Html]] = {
        "results": ("Results", joined([facts_html(run), results_html(run)])),
        "phases": ("Phases", timeline_html(run)),
        "freeze": ("Freeze map", freeze_map_html(run)),
        "curves": ("Curves", curves_html(run)),
        "dividend": ("Dividend", dividend_html(run)),
        "audit": ("Audit", proof_html(run)),
        **({"taken": ("Taken over", taken)} if taken else {}),
        "gradients": ("Gradient conflicts", conflicts_html(run)),
        "predictions": ("Predictions", predictions),
        "origin": ("Origin", origin_html(run)),
        "configuration": ("Configuration", configuration_html(run)),
    }
    intro = tag("p", _about(run.config), class_="about")
    footer = f"mtl {__version__}. To write this page again: mtl report {run.folder}"
    return page(run.name, "mtl run", intro, parts, tag("p", footer))


def _about(config: Mapping[str, Any]) -> str:
    """A line on what was trained."""
    tasks = config.get("tasks", {})
    data = config.get("data", {})
    listed = ", ".join(tasks) if isinstance(tasks, Mapping) else ""
    name = data.get("name", "") if isinstance(data, Mapping) else ""
    return f"{listed} on {name}" if listed and name else listed or str(name)


def _with_weights(setup: RunSetup, run_dir: Path) -> tuple[RunSetup, Mapping[str, Any], str]:
    """The set-up with the run's best weights in its model, their state, and which weights they are."""
    # A run whose score never was a number has no best weights.
    which = "best" if (run_dir / "checkpoints" / "best").exists() else "last"
    if any(is_sharded(parameter) for parameter in setup.root.parameters()):
        # The other ranks have exited: build an unsharded model.
        trunk = setup.config.trunk.model_copy(update={"weights": "none"})
        own = build_model_setup(setup.config.with_changes(trunk=trunk), source=setup.source)
        own.root.to(setup.device)
        setup = replace(setup, model=own.model, root=own.root)
    state, _ = load_checkpoint(run_dir / "checkpoints" / which, setup.root)
    return setup, state, which
