"""`mtl bench`: what a freeze pays on this machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mtl.cli.verb import DONE, refuse
from mtl.runtime.console import line_width, print_err, print_out

if TYPE_CHECKING:
    import argparse

    from mtl.cli.guard import Attempt
    from mtl.cli.verb import Verbs


def add_parser(verbs: Verbs) -> None:
    """Adds the verb to the command line."""
    parser = verbs.add_parser("bench", help="what a freeze pays, measured here", description=run.__doc__)
    parser.set_defaults(run=run)
    parser.add_argument("--quick", action="store_true", help="fewer settings and rounds, under three minutes")
    parser.add_argument("--json", action="store_true", help="print plain data")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the times into a picture as well")


def run(options: argparse.Namespace, _: Attempt) -> int:
    """Times epochs of three loops in turn: the naive one, mtl's, and one on features extracted by hand."""
    plot = options.plot
    if plot is not None and (plot.suffix.lower() not in (".png", ".pdf", ".svg") or not plot.parent.is_dir()):
        return refuse(f"--plot: expected a .png, .pdf or .svg in a folder that is there, got {plot}")

    from mtl.results.bench import bench, draw, in_words, to_json

    rows = bench(options.quick, print_err)
    print_out(json.dumps(to_json(rows), indent=2) if options.json else in_words(rows, line_width(sys.stdout)))
    if plot is not None:
        try:
            draw(rows).savefig(plot)
        except OSError as error:
            return refuse(f"--plot: {plot} cannot be written: {error.strerror}")
        print_err(str(plot))
    return DONE
