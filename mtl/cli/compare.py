"""`mtl compare`: configurations, seeds and a tuning grid, trained and put side by side."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mtl.cli.verb import DONE, FAILED, VIOLATION, WRONG_INPUT, refuse
from mtl.runtime.console import line_width, print_err, print_out

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from mtl.cli.guard import Attempt
    from mtl.cli.verb import Verbs
    from mtl.results.comparison.collect import Equal
    from mtl.results.comparison.design import Design, Job
    from mtl.results.comparison.runner import Failure


def add_parser(verbs: Verbs) -> None:
    """Adds the verb to the command line."""
    what = "train configurations with several seeds, and compare them"
    parser = verbs.add_parser("compare", help=what, description=run.__doc__)
    parser.set_defaults(run=run)
    parser.add_argument("configs", type=Path, nargs="+", metavar="CONFIG", help="YAML files, or names such as scenes")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where runs and tables go")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N - 1 of each; by default 3")
    parser.add_argument(
        "--set", action="append", default=[], metavar="key=value", help="a setting of all runs; may be repeated"
    )
    parser.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="key=a,b",
        help="tune each configuration over these values; may be repeated",
    )
    parser.add_argument("--stl", action="store_true", help="also train each task of the first CONFIG by itself")
    parser.add_argument("--jobs", type=int, default=1, metavar="K", help="runs at the same time; by default 1")
    parser.add_argument(
        "--equal", choices=["steps", "time"], help="compare at equal steps or seconds; by default at each end"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the runs, and train nothing")


def run(options: argparse.Namespace, _: Attempt) -> int:
    """Trains every CONFIG with every seed, each run in a process and directory of its own, and writes tables, a figure
    and a page. Killed at any moment, the same command continues.
    """
    from mtl.results.comparison.design import DesignError, design
    from mtl.results.comparison.runner import claimed, code_of, command_of, train_all

    folder: Path = options.out
    if options.jobs < 1:
        return refuse(f"--jobs: expected 1 or more, got {options.jobs}")
    if folder.exists() and not folder.is_dir():
        return refuse(f"--out: expected a folder, got the file {folder}")
    try:
        plan = design(options.configs, options.set, options.seeds, options.grid, options.stl, folder)
        left = [job for job in plan.jobs if code_of(folder, job) is None]
        _check(left)
        if options.dry_run:
            for job in plan.jobs:
                print_out(shlex.join(["python", *command_of(job)]))
            return DONE
        with claimed(folder, plan):
            failures = train_all(folder, plan, options.jobs, print_err)
            code = _write(folder, plan, options.equal, failures)
    except DesignError as error:
        return refuse(error)
    except OSError as error:
        return refuse(f"{error.filename or folder} cannot be written: {error.strerror}")
    return code


def _check(jobs: Sequence[Job]) -> None:
    if jobs:
        from mtl.results.comparison.check import check_models

        check_models(jobs)


def _write(folder: Path, plan: Design, equal: Equal | None, failures: Sequence[Failure]) -> int:
    from mtl.checkpoint.run_files import RunFileError
    from mtl.results.comparison.collect import collect
    from mtl.results.comparison.design import DesignError
    from mtl.results.comparison.runner import code_of
    from mtl.results.comparison.table import in_words
    from mtl.results.comparison.write import write_all

    for failure in failures:
        print_err(f"error: {failure.job.name}: exit code {failure.code}: {failure.message}")
    if failures:
        print_err(f"the output of these runs is in {folder / 'logs'}; the same command trains them again")
    try:
        found = collect(folder, plan, equal, [failure.job.name for failure in failures])
        files = write_all(folder, found, shlex.join(["mtl", *sys.argv[1:]]))
        print_out(in_words(found, line_width(sys.stdout)))
        print_err(f"{folder}: {', '.join(file.name for file in files)}")
    except RunFileError as error:
        return refuse(error)
    except DesignError as error:
        refuse(error)
    if failures:
        return WRONG_INPUT if any(failure.code == WRONG_INPUT for failure in failures) else FAILED
    codes = [code_of(folder, job) for job in plan.jobs]
    return VIOLATION if VIOLATION in codes else DONE
