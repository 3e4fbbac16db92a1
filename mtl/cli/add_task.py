"""`mtl add-task`: adds tasks to a trained model, and proves that the outputs of the others are what they were."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from mtl.cli.train import run_loaded
from mtl.cli.verb import DONE, VIOLATION

if TYPE_CHECKING:
    import argparse

    from mtl.checkpoint.trained_run import TrainedRun
    from mtl.cli.guard import Attempt
    from mtl.cli.verb import Verbs
    from mtl.training.result import RunResult
    from mtl.training.setup import RunSetup


def add_parser(verbs: Verbs) -> None:
    """Adds the verb to the command line."""
    parser = verbs.add_parser("add-task", help="add tasks to a trained model", description=run.__doc__)
    parser.set_defaults(run=run)
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="the directory of a finished run")
    parser.add_argument("config", type=Path, metavar="CONFIG", help="the new tasks, as YAML; see docs/add_task.md")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for train")
    parser.add_argument("--name", metavar="NAME", help="the name of the new run; RUN and the new tasks if not given")
    parser.add_argument("-q", "--quiet", action="store_true", help="show nothing but warnings and errors")


def run(options: argparse.Namespace, attempt: Attempt) -> int:
    """Trains heads of CONFIG's tasks on RUN's frozen model, and proves that outputs of RUN's tasks keep every bit."""
    attempt.trains = True

    from mtl.training.add_task import config_with_tasks, open_finished_run

    old = open_finished_run(options.run_dir)
    command = ["mtl", "add-task", str(options.run_dir), str(options.config), *options.overrides]
    command += ["--name", options.name] if options.name else []
    config = config_with_tasks(old, options.config, options.overrides, options.name, shlex.join(command))

    def prove(setup: RunSetup, result: RunResult) -> bool:
        return _outputs_are_unchanged(setup, result, old)

    _, is_clean = run_loaded(config, options.quiet, attempt, prove)
    return DONE if is_clean else VIOLATION


def _outputs_are_unchanged(setup: RunSetup, result: RunResult, old: TrainedRun) -> bool:
    """Compares the outputs of the old tasks, logs the result, and writes it into the run directory."""
    import logging

    from mtl.checkpoint.run_files import UNCHANGED
    from mtl.results.unchanged import compare_outputs
    from mtl.runtime.console import logger
    from mtl.runtime.files import write_json

    found = compare_outputs(setup, result.run_dir, old)
    logger.log(logging.INFO if found.equal else logging.ERROR, str(found))
    write_json(result.run_dir / UNCHANGED, found.to_json())
    return found.equal
