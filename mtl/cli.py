"""The command line: parses, calls, sets the exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mtl import __version__

DONE, FAILED, WRONG_INPUT, VIOLATION = 0, 1, 2, 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb.

    Returns:
        0 done; 2 the user's input is wrong; 3 the audit found a violation. Anything else is raised, which makes 1.
    """
    parser = argparse.ArgumentParser(prog="mtl", description="Multi-task learning with freezes that are proven.")
    parser.add_argument("--version", action="version", version=f"mtl {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    train = verbs.add_parser("train", help="train a configuration", description=_train.__doc__)
    train.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file, such as configs/scenes.yaml")
    train.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as optim.lr=3e-4 phases.finetune.epochs=2"
    )
    train.add_argument("-q", "--quiet", action="store_true", help="show nothing but warnings and errors")
    report = verbs.add_parser("report", help="write the report of a run again", description=_report.__doc__)
    report.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="such as runs/scenes")
    report.add_argument("--picture", type=Path, metavar="FILE", help="put the report's picture into a PNG file as well")
    options, rest = parser.parse_known_args(arguments)
    # argparse takes key=value pairs only in one piece; those behind an option come back as the rest.
    unknown = [argument for argument in rest if argument.startswith("-") or options.verb != "train"]
    if unknown:
        verbs.choices[options.verb].error(f"unrecognized arguments: {' '.join(unknown)}")
    if options.verb == "report":
        return _report(options.run_dir, options.picture)
    return _train(options.config, [*options.overrides, *rest], options.quiet)


def _train(file: Path, overrides: Sequence[str], quiet: bool) -> int:
    """Trains through the phases of CONFIG, proves what they froze, and writes a run directory."""
    from mtl.config import load_config
    from mtl.yaml_source import ConfigError

    # The configuration is checked before torch and timm are loaded, which takes seconds.
    try:
        config = load_config(file, overrides)
    except ConfigError as error:
        return _complain(error)

    from mtl.assembly import assemble, check_run_dir
    from mtl.audit import AuditError
    from mtl.console import logger, show_log
    from mtl.data import DataError
    from mtl.report import write_report
    from mtl.summary import phases_table, results_table, verdict
    from mtl.trainer import train

    show_log(quiet)
    try:
        check_run_dir(config)
        parts = assemble(config, quiet)
        logger.info(phases_table(parts))
        outcome = train(parts, quiet)
    except (ConfigError, DataError) as error:
        return _complain(error)
    except AuditError as error:
        sys.stderr.write(f"audit: {error}\nSee {config.run_dir / 'audit.json'}\n")
        return VIOLATION
    except FloatingPointError as error:
        sys.stderr.write(f"error: {error}\n")
        return FAILED
    logger.info(results_table(outcome))
    logger.info(verdict(outcome))
    logger.info(
        f"best val/score {outcome.best_score:.3f} at step {outcome.best_step}; {outcome.train_s:.0f} s of training"
    )
    # Last, since all else is on disk by now: a drawing that fails costs nothing.
    files = [write_report(parts, outcome.run_dir).name, "checkpoints/{best,last}", "metrics.jsonl", "audit.json"]
    logger.info(f"{outcome.run_dir}: {', '.join([*files, 'plan.json', 'config.yaml'])}")
    return DONE if outcome.report.ok else VIOLATION


def _report(run_dir: Path, picture: Path | None) -> int:
    """Writes RUN_DIR/report.html: what was trained, what came out, and what the audit proved."""
    from mtl.config import load_config
    from mtl.yaml_source import ConfigError

    needed = ["config.yaml", "metrics.jsonl", "audit.json", "checkpoints/best/state.json"]
    missing = [name for name in needed if not (run_dir / name).is_file()]
    if missing:
        return _complain(ValueError(f"{run_dir} is no finished run: it lacks {', '.join(missing)}"))

    from mtl.assembly import assemble
    from mtl.data import DataError
    from mtl.report import write_report

    try:
        # Only the architecture is needed: the weights are the run's own.
        parts = assemble(load_config(run_dir / "config.yaml", ["trunk.weights=none", "device=auto"]))
    except (ConfigError, DataError) as error:
        return _complain(error)
    sys.stdout.write(f"{write_report(parts, run_dir, picture)}\n")
    return DONE


def _complain(error: Exception) -> int:
    for line in str(error).splitlines():
        sys.stderr.write(f"error: {line}\n")
    return WRONG_INPUT
