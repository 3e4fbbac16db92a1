"""The command line: builds the parser, and passes the arguments to a verb."""

from __future__ import annotations

import argparse
import atexit
import gc
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from mtl.cli import add_task, audit, bench, compare, data, export, plan, predict, report, train
from mtl.cli import eval as evaluation
from mtl.cli.guard import Attempt, guarded
from mtl.runtime.console import print_err, print_out
from mtl.runtime.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb.

    Returns:
        0 done; 2 the user's input is wrong; 3 the audit found a violation; 1 anything else. Errors of ours are raised,
        which makes 1.
    """
    # At its end, Python would look for cycles among all objects before it lets go of them: half a second.
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)
    return guarded(lambda attempt: _run(arguments, attempt))


def _run(arguments: Sequence[str] | None, attempt: Attempt) -> int:
    parser, verbs = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes key=value pairs only in one piece; those after an option come back as the rest.
    takes_pairs = "overrides" in options
    unknown = [argument for argument in rest if argument.startswith("-") or not takes_pairs]
    if unknown:
        verbs[options.verb].error(f"unrecognized arguments: {' '.join(unknown)}")
    if takes_pairs:
        options.overrides += rest
    code: int = options.run(options, attempt)
    return code


class _Parser(argparse.ArgumentParser):
    def __init__(self, **settings: Any) -> None:
        # A part of an option's name is a mistake: another version of mtl may have an option that it fits better.
        super().__init__(**settings, allow_abbrev=False)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Argparse itself drops what cannot be written."""
        (print_out if file is sys.stdout else print_err)(message)


def _parser() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """The whole command line, and the part of each verb."""
    parser = _Parser(prog="mtl", description="Multi-task learning with freezes that are proven.")
    parser.add_argument("--version", action="version", version=f"mtl {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in (train, add_task, plan, data, audit, evaluation, predict, bench, export, report, compare):
        verb.add_parser(verbs)
    return parser, verbs.choices
