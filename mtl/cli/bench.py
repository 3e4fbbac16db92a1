"""`mtl bench`: what a freeze pays, and what the loop costs, on this machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mtl.cli.verb import DONE, refuse
from mtl.runtime.console import line_width, print_err, print_lines, print_out

if TYPE_CHECKING:
    import argparse

    from mtl.cli.guard import Attempt
    from mtl.cli.verb import Verbs


def add_parser(verbs: Verbs) -> None:
    """Adds the verb to the command line."""
    parser = verbs.add_parser("bench", help="what a freeze pays, measured here", description=run.__doc__)
    parser.set_defaults(run=run)
    parser.add_argument("--quick", action="store_true", help="fewer settings, steps and rounds")
    parser.add_argument(
        "--peers", action="store_true", help="also run LibMTL's loop and Lightning with FinetuningScheduler"
    )
    parser.add_argument("--json", action="store_true", help="print plain data")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the times into a picture as well")


def run(options: argparse.Namespace, _: Attempt) -> int:
    """Times whole epochs of loops in turn: the naive one, mtl's as `mtl train` runs it, and the limit, which is written
    by hand for one phase, on features that were extracted before.
    """
    plot = options.plot
    if plot is not None and (plot.suffix.lower() not in (".png", ".pdf", ".svg") or not plot.parent.is_dir()):
        return refuse(f"--plot: expected a .png, .pdf or .svg in a folder that is there, got {plot}")

    from mtl.results.bench import bench, draw, in_words

    found = bench(options.quick, print_err, options.peers)
    if options.json:
        print_out(json.dumps(found.to_json(), indent=2))
    else:
        print_lines(in_words(found, line_width(sys.stdout)))
    if plot is not None:
        try:
            draw(found).savefig(plot)
        except OSError as error:
            return refuse(f"--plot: {plot} cannot be written: {error.strerror}")
        print_err(str(plot))
    return DONE
