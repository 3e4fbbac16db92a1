"""`mtl report`: writes the report of a run again, or compares several runs on one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mtl.cli.verb import DONE, refuse
from mtl.runtime.console import print_out

if TYPE_CHECKING:
    import argparse

    from mtl.cli.guard import Attempt
    from mtl.cli.verb import Verbs


def add_parser(verbs: Verbs) -> None:
    """Adds the verb to the command line."""
    parser = verbs.add_parser("report", help="write the report of a run, or compare runs", description=run.__doc__)
    parser.set_defaults(run=run)
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR", help="such as runs/scenes")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="where the page goes: RUN_DIR/report.html of one run, compare.html next to the first of several",
    )
    parser.add_argument("--force", action="store_true", help="overwrite a page that is there")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="put a picture of the run into a PNG file as well")


def run(options: argparse.Namespace, _: Attempt) -> int:
    """Writes RUN_DIR/report.html: what was trained, what came out, and what the audit proved; compares several runs."""
    from mtl.checkpoint.run_files import RunFileError

    run_dirs: list[Path] = options.run_dirs
    why = _why_not(run_dirs, options)
    if why:
        return refuse(why)
    out = options.out
    if out is None and len(run_dirs) > 1:
        out = run_dirs[0].resolve().parent / "compare.html"
    # The report of a run is the run's own, and is written again.
    if out is not None and not options.force and out.exists() and not _is_own(out, run_dirs):
        return refuse(f"{out} exists; --force overwrites it, --out FILE writes somewhere else")
    try:
        page = _compare(run_dirs, out) if len(run_dirs) > 1 else _report(run_dirs[0], out, options.picture)
    except RunFileError as error:
        return refuse(str(error))
    except OSError as error:
        return refuse(f"{error.filename or out or run_dirs[0]} cannot be written: {error.strerror}")
    print_out(str(page))
    return DONE


def _is_own(out: Path, run_dirs: Sequence[Path]) -> bool:
    """Whether a page is the `report.html` of the only run."""
    return len(run_dirs) == 1 and out.resolve() == (run_dirs[0] / "report.html").resolve()


def _why_not(run_dirs: Sequence[Path], options: argparse.Namespace) -> str:
    """The mistake in the arguments; empty if there is none."""
    from mtl.results.report.run import what_is_missing

    for run_dir in run_dirs:
        if missing := what_is_missing(run_dir):
            return f"{run_dir} is not a finished run: it lacks {', '.join(missing)}"
    resolved = [run_dir.resolve() for run_dir in run_dirs]
    if twice := [each for place, each in enumerate(run_dirs) if resolved[place] in resolved[:place]]:
        return f"{twice[0]} is given twice; expected runs that differ"
    if options.picture is not None:
        if len(run_dirs) > 1:
            return "--picture: expected one run; several have no picture"
        if options.picture.suffix.lower() != ".png":
            return f"--picture: expected a name that ends in .png, got {options.picture}"
    if options.out is not None and options.out.suffix.lower() not in (".html", ".htm"):
        return f"--out: expected a name that ends in .html, got {options.out}"
    return ""


def _report(run_dir: Path, out: Path | None, picture: Path | None) -> Path:
    from mtl.config import load_config
    from mtl.results.report.run import read_run
    from mtl.results.report.write import write_report
    from mtl.training.data_record import search_as_the_run_did
    from mtl.training.setup import assemble

    search_as_the_run_did(run_dir)
    # Only the architecture is needed: the weights are the run's own, and so are those of teachers.
    config = load_config(run_dir / "config.yaml", ["trunk.weights=none", "device=auto"])
    # A damaged file is said before the set-up, which takes longer.
    read_run(run_dir)
    setup = assemble(config, begins=False, teachers_from=run_dir / "checkpoints" / "last")
    return write_report(setup, run_dir, picture, out)


def _compare(run_dirs: Sequence[Path], out: Path) -> Path:
    from mtl.results.report.several import write_several

    return write_several(run_dirs, out)
