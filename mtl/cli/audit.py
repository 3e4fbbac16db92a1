"""`mtl audit`: proves a finished run from its files, or compares two checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from mtl.cli.verb import DONE, FAILED, VIOLATION, refuse
from mtl.runtime.console import print_lines, print_out

if TYPE_CHECKING:
    import argparse

    from mtl.cli.guard import Attempt
    from mtl.cli.verb import Verbs


def add_parser(verbs: Verbs) -> None:
    """Adds the verb to the command line."""
    parser = verbs.add_parser("audit", help="prove a run, or compare two checkpoints", description=run.__doc__)
    parser.set_defaults(run=run)
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="a run directory, or two checkpoints")
    parser.add_argument(
        "--freeze", nargs="+", metavar="PATTERN", help="what has to be the same; everything if not given"
    )
    parser.add_argument("--json", action="store_true", help="print plain data")


def run(options: argparse.Namespace, _: Attempt) -> int:
    """Proves a finished run again from its own files, or names the tensors of two checkpoints that differ in a bit."""
    paths, freeze = options.paths, options.freeze
    if len(paths) > 2 or (len(paths) == 1 and freeze):
        return refuse("expected a run directory alone, or two checkpoints and --freeze PATTERN ...")

    from mtl.audit.offline.compare import compare_checkpoints
    from mtl.audit.offline.run import audit_run
    from mtl.patterns import PatternError

    try:
        result = audit_run(paths[0]) if len(paths) == 1 else compare_checkpoints(paths[0], paths[1], freeze or ["**"])
    except PatternError as error:
        return refuse(f"{error}; a checkpoint has names, but no positions, depth groups or classes")
    if options.json:
        print_out(json.dumps(result.to_json(), indent=2))
    else:
        print_lines(str(result))
    if result.is_broken:
        return VIOLATION
    # What was not proven is not clean, and no violation either.
    return DONE if result.ok else FAILED
