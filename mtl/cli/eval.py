"""`mtl eval`: the metrics of a trained model."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtl.cli.verb import DONE
from mtl.runtime.console import print_lines, print_out

if TYPE_CHECKING:
    import argparse

    from mtl.cli.guard import Attempt
    from mtl.cli.verb import Verbs
    from mtl.results.evaluate import Evaluation
    from mtl.results.trained import TrainedModel


def add_parser(verbs: Verbs) -> None:
    """Adds the verb to the command line."""
    parser = verbs.add_parser("eval", help="measure a trained model", description=run.__doc__)
    parser.set_defaults(run=run)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="such as runs/scenes")
    parser.add_argument(
        "--data", type=Path, metavar="CONFIG", help="measure on the data set of this YAML file, not on the run's own"
    )
    parser.add_argument("--split", choices=["val", "test"], default="val", help="by default val")
    parser.add_argument("--tasks", metavar="NAME,...", help="measure these tasks; by default all")
    add_which(parser)
    parser.add_argument("--protocol", metavar="NAME", help="add the numbers of a published code base: mtan, astmt, ...")
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_which(parser: argparse.ArgumentParser) -> None:
    """Adds what every verb about a trained model has: which weights, and where they compute."""
    parser.add_argument("--which", metavar="best|last|STEP", help="the checkpoint; by default the best one")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:N")


def named_tasks(text: str | None) -> list[str] | None:
    """The tasks that `--tasks` names; None without it, which is all."""
    return None if text is None else [name.strip() for name in text.split(",")]


def run(options: argparse.Namespace, _: Attempt) -> int:
    """Measures the model of RUN_DIR on its validation data, a test split or other data. RUN_DIR is not changed."""
    from mtl.results.evaluate import evaluate
    from mtl.results.run_choice import read_run
    from mtl.results.trained import load_as
    from mtl.runtime.console import show_log
    from mtl.runtime.files import without_nan
    from mtl.training.setup import device_of

    show_log(quiet=True)
    overrides = [f"device={options.device}"]
    overrides += [f"evaluate.protocol={options.protocol}"] if options.protocol is not None else []
    config = read_run(options.run_dir, overrides, options.data)
    model = load_as(options.run_dir, config, options.which, device_of(config))
    found = evaluate(model, options.split, named_tasks(options.tasks), quiet=options.json)
    if options.json:
        print_out(json.dumps(without_nan(_as_json(model, found)), indent=2))
    else:
        print_lines(_as_text(model, found))
    return DONE


def _as_json(model: TrainedModel, found: Evaluation) -> dict[str, Any]:
    origin = model.origin
    return {
        "run": str(origin.run_dir),
        "checkpoint": origin.checkpoint,
        "step": origin.step,
        "fingerprint": origin.fingerprint,
        "data": model.config.data.name,
        "split": found.split,
        "images": found.num_images,
        "val/score": found.score,
        "metrics": found.metrics,
        "trivial": found.trivial,
    }


def _as_text(model: TrainedModel, found: Evaluation) -> str:
    from mtl.runtime.console import line_width
    from mtl.runtime.layout import table

    rows = [
        [task, name, f"{found.trivial[task][name]:.4f}" if task in found.trivial else "-", f"{value:.4f}"]
        for task, own in found.metrics.items()
        for name, value in own.items()
    ]
    origin, split = model.origin, found.split
    head = ["task", "metric", "trivial", split]
    what = f"{origin.run_dir}: weights {origin.checkpoint}, of step {origin.step}; {origin.fingerprint}"
    score = "none" if math.isnan(found.score) else f"{found.score:.3f}"
    closing = f"score {score}; {found.num_images:,} images of {model.config.data.name}, {split}"
    return "\n".join([what, table(head, rows, range(2, 4), line_width(sys.stdout), keys=2), closing])
