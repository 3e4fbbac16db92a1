"""`mtl train`, from a file to a trained run and its report; in Python `mtl.train`."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mtl.cli.guard import Attempt
from mtl.cli.verb import DONE, VIOLATION
from mtl.runtime.collection import without_collection
from mtl.runtime.uncompiled import without_compiler

if TYPE_CHECKING:
    import argparse

    from mtl.cli.verb import Verbs
    from mtl.config import RunConfig
    from mtl.distributed.world import World
    from mtl.training.result import RunResult
    from mtl.training.setup import RunSetup


def add_parser(verbs: Verbs) -> None:
    """Adds the verb to the command line."""
    parser = verbs.add_parser("train", help="train a configuration", description=run.__doc__)
    parser.set_defaults(run=run)
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file, or a name such as scenes")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as optim.lr_scale=0.5 phases.finetune.epochs=2"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="show nothing but warnings and errors")


def run(options: argparse.Namespace, attempt: Attempt) -> int:
    """Trains through the phases of CONFIG, proves what they froze, and writes a run directory."""
    _, is_clean = run_config(options.config, options.overrides, options.quiet, attempt)
    return DONE if is_clean else VIOLATION


def train_config(config: str | Path, *overrides: str, quiet: bool = False) -> RunResult:
    """Trains a configuration as the command `mtl train` does, and writes its run directory.

    Args:
        config: A YAML file.
        overrides: Dotted `key=value` pairs, such as `phases.finetune.epochs=2`.
        quiet: Whether only warnings are shown.

    Returns:
        The run's result: its directory, scores by phase, and the audit's report.

    Raises:
        ConfigError: Anything in the configuration that does not work, with the place where it was written.
        DataError: The data cannot be had.
        AuditError: The freeze was broken, and the audit's policy is to raise.
        NotFiniteError: A loss or a gradient is not finite, and the policy is to raise.
        SaveError: A checkpoint cannot be written.
        Stopped: It was asked to end, and has saved where it stands.
    """
    return run_config(Path(config), overrides, quiet, Attempt())[0]


def run_config(file: Path, overrides: Sequence[str], quiet: bool, attempt: Attempt) -> tuple[RunResult, bool]:
    """As `train_config`, and records in `attempt` how far it has come.

    Returns:
        The run's result, and whether the audit is clean in all processes.

    Raises: as `train_config`.
    """
    attempt.trains = True

    from mtl.config import load_config

    # The configuration is checked before torch and timm are loaded, which takes seconds.
    return run_loaded(load_config(file, overrides), quiet, attempt)


def run_loaded(
    config: RunConfig, quiet: bool, attempt: Attempt, prove: Callable[[RunSetup, RunResult], bool] | None = None
) -> tuple[RunResult, bool]:
    """As `run_config`, of a configuration that was read.

    Args:
        config: The run.
        quiet: Whether only warnings are shown.
        attempt: How far it has come.
        prove: Called by rank 0 before the report is written; whether what it proves holds.

    Returns, raises: as `run_config`.
    """
    from mtl.training.run_dir import check_run_dir

    check_run_dir(config)
    attempt.config = config
    # Where nothing is compiled, the compiler need not be imported: it takes a second.
    with nullcontext() if config.compile else without_compiler():
        return _run_checked(config, quiet, attempt, prove)


def _run_checked(
    config: RunConfig, quiet: bool, attempt: Attempt, prove: Callable[[RunSetup, RunResult], bool] | None
) -> tuple[RunResult, bool]:
    with without_collection():
        from mtl.distributed.world import World
        from mtl.phases.plan.text import short_plan
        from mtl.runtime.console import line_width, logger, show_log
        from mtl.training.resume import resumed_config
        from mtl.training.run import train
        from mtl.training.run_dir import own_name
        from mtl.training.setup import assemble
        from mtl.training.tracking.choice import check_backend

        world = attempt.world = World.from_environment()
        show_log(quiet or not world.is_main, only_errors=not world.is_main)
        check_backend(config)
        config, source = resumed_config(config)
        attempt.config = config
        setup = assemble(config, quiet, world, begins=source is None)
    attempt.plan = setup.plan
    logger.info(short_plan(setup.plan, line_width(sys.stdout)))
    with own_name(setup.config, world.is_main, world.broadcast) as config:
        setup = replace(setup, config=config)
        attempt.config = config
        result = train(setup, quiet, world, source)
    attempt.is_trained = True
    if result.asked_to_end and world.is_alone:
        # It came too late to end training; what is left is the report.
        raise KeyboardInterrupt(result.asked_to_end)
    return result, _close(setup, result, world, prove)


def _close(
    setup: RunSetup, result: RunResult, world: World, prove: Callable[[RunSetup, RunResult], bool] | None
) -> bool:
    """Logs a run's result, and leaves the other processes; whether the audit is clean in all, and `prove` holds."""
    from mtl.checkpoint.run_files import RunFileError
    from mtl.results.report.write import write_report
    from mtl.results.summary import closing_line, results_table, verdict
    from mtl.runtime.console import line_width, logger

    is_clean = not world.all_reduce_flags(broken=not result.report.ok).broken
    if world.is_main:
        main = {name: task.goal.metric for name, task in setup.tasks.items()}
        logger.info(results_table(result, main, line_width(sys.stdout)))
        logger.log(logging.INFO if result.report.ok else logging.ERROR, verdict(result))
        logger.info(closing_line(result))
        if result.report.ok and not is_clean:
            logger.error(f"audit: another rank found the freeze broken; see {result.run_dir}/audit.rank-N.json")
        is_clean = (prove is None or prove(setup, result)) and is_clean
        # Last, since all else is on disk by now: a drawing that fails costs nothing.
        kept = "last" if math.isnan(result.best_score) else "{best,last}"
        files = [f"checkpoints/{kept}", "metrics.jsonl", "audit.json", "plan.json", "config.yaml"]
        try:
            files.insert(0, write_report(setup, result.run_dir).name)
        except (OSError, RunFileError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            logger.warning(f"report.html cannot be written ({reason}); to write it later: mtl report {result.run_dir}")
        logger.info(f"{result.run_dir}: {', '.join(files)}")
    # torchrun ends all processes as soon as one has failed.
    world.barrier()
    world.close()
    return is_clean
