"""`mtl data`: looks at a data set before it is trained on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mtl.cli.verb import DONE, WRONG_INPUT, refuse
from mtl.runtime.console import print_err, print_lines, print_out

if TYPE_CHECKING:
    import argparse

    from mtl.cli.guard import Attempt
    from mtl.cli.verb import Verbs


def add_parser(verbs: Verbs) -> None:
    """Adds the verb to the command line."""
    parser = verbs.add_parser("data", help="check a data set, or prepare one", description=__doc__)
    inner = parser.add_subparsers(required=True, metavar="check|prepare")
    for name, run, text in (
        ("check", check, "read every file of the data set, and say what is in it"),
        ("prepare", prepare, "derive labels of a public data set, once"),
    ):
        own = inner.add_parser(name, help=text, description=run.__doc__)
        own.set_defaults(run=run)
        own.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file, or a name such as scenes")
        own.add_argument("overrides", nargs="*", metavar="key=value", help="as for train")
        if run is check:
            own.add_argument("--picture", type=Path, metavar="FILE", help="draw some samples into a PNG file as well")


def check(options: argparse.Namespace, _: Attempt) -> int:
    """Reads every image and label of CONFIG's data set, and names all that are wrong at once (exit code 2)."""
    picture = options.picture
    if picture is not None and picture.suffix.lower() != ".png":
        return refuse(f"--picture: expected a name that ends in .png, got {picture}")

    from mtl.config import load_config
    from mtl.results.data_check import DataCheck

    found = DataCheck(load_config(options.config, options.overrides))
    for line in found.lines():
        print_lines(line)
    for line in found.mistakes:
        print_err(f"error: {line}")
    if picture is not None and not found.mistakes:
        try:
            found.draw(picture)
        except OSError as error:
            return refuse(f"--picture: {picture} cannot be written: {error.strerror}")
        print_out(str(picture))
    return WRONG_INPUT if found.mistakes else DONE


def prepare(options: argparse.Namespace, _: Attempt) -> int:
    """Derives labels of CONFIG's public data set, such as PASCAL-MT's edges, and writes them next to the data."""
    from mtl.config import load_config
    from mtl.config.public_data import PublicDataConfig
    from mtl.data.files.sets import public_set

    data = load_config(options.config, options.overrides).data
    if not isinstance(data, PublicDataConfig):
        return refuse(f"data.name: {data.name} has nothing to prepare; public data sets may")
    public_set(data.name).prepare(data, print_lines)
    return DONE
