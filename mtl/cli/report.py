"""`mtl report`: writes the report of a run again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mtl.cli.verb import DONE, refuse
from mtl.runtime.console import print_out

if TYPE_CHECKING:
    import argparse

    from mtl.cli.guard import Attempt
    from mtl.cli.verb import Verbs

_NEEDED = ("config.yaml", "metrics.jsonl", "audit.json", "checkpoints/last/state.json")


def add_parser(verbs: Verbs) -> None:
    """Adds the verb to the command line."""
    parser = verbs.add_parser("report", help="write the report of a run again", description=run.__doc__)
    parser.set_defaults(run=run)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="such as runs/scenes")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="put the report's picture into a PNG file as well")


def run(options: argparse.Namespace, _: Attempt) -> int:
    """Writes RUN_DIR/report.html: what was trained, what came out, and what the audit proved."""
    run_dir, picture = options.run_dir, options.picture
    missing = [name for name in _NEEDED if not (run_dir / name).is_file()]
    if missing:
        return refuse(f"{run_dir} is not a finished run: it lacks {', '.join(missing)}")
    if picture is not None and picture.suffix.lower() != ".png":
        return refuse(f"--picture: expected a name that ends in .png, got {picture}")

    from mtl.config import load_config
    from mtl.results.report import write_report
    from mtl.training.data_record import search_as_the_run_did
    from mtl.training.setup import assemble

    search_as_the_run_did(run_dir)
    # Only the architecture is needed: the weights are the run's own, and so are those of teachers.
    config = load_config(run_dir / "config.yaml", ["trunk.weights=none", "device=auto"])
    setup = assemble(config, begins=False, teachers_from=run_dir / "checkpoints" / "last")
    try:
        page = write_report(setup, run_dir, picture)
    except OSError as error:
        return refuse(f"{error.filename or run_dir} cannot be written: {error.strerror}")
    print_out(str(page))
    return DONE
