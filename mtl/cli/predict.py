"""`mtl predict`: the outputs of a trained model for images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mtl.cli.eval import add_which, named_tasks
from mtl.cli.verb import DONE, WRONG_INPUT, refuse
from mtl.runtime.console import print_err, print_lines

if TYPE_CHECKING:
    import argparse

    from mtl.cli.guard import Attempt
    from mtl.cli.verb import Verbs


def add_parser(verbs: Verbs) -> None:
    """Adds the verb to the command line."""
    parser = verbs.add_parser("predict", help="a trained model's outputs for images", description=run.__doc__)
    parser.set_defaults(run=run)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="such as runs/scenes")
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="images, videos, folders of them, or patterns such as 'a/*.jpg'"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--tasks", metavar="NAME,...", help="these tasks; by default all")
    parser.add_argument("--to-labels", action="store_true", help="write labels.csv, which data.name=table reads")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images at once; by default 32")
    parser.add_argument("--force", action="store_true", help="write into a folder that is not empty")
    add_which(parser)


def run(options: argparse.Namespace, _: Attempt) -> int:
    """Writes masks, depths, normals and tables for images, in task units and at each image's own size.

    What cannot be read is named and left out, and the exit code is then 2. RUN_DIR is not changed.
    """
    out: Path = options.out
    if options.batch_size < 1:
        return refuse(f"--batch-size: expected 1 or more, got {options.batch_size}")
    if (reason := why_not_written(out, options.run_dir, options.force)) is not None:
        return refuse(reason)

    from mtl.results.predict.folder import predict_files
    from mtl.results.predict.inputs import find_inputs
    from mtl.results.run_choice import read_run
    from mtl.results.trained import load_as
    from mtl.runtime.console import show_log
    from mtl.runtime.text import count
    from mtl.training.setup import device_of

    show_log(quiet=True)
    config = read_run(options.run_dir, [f"device={options.device}"])
    inputs = find_inputs(options.files)
    model = load_as(options.run_dir, config, options.which, device_of(config))
    if config.data.transform.val:
        print_err("warning: data.transform.val is not done to these images; each is only brought to data.image_size")
    names = model.names_of(named_tasks(options.tasks))
    try:
        written = predict_files(model, inputs, out, names, options.to_labels, options.batch_size, quiet=False)
    except OSError as error:
        return refuse(f"--out: {error.filename or out} cannot be written: {error.strerror}")
    for line in written.bad:
        print_err(f"error: {line}")
    bad = f"; left out: {len(written.bad)}" if written.bad else ""
    print_lines(f"{out}: predictions for {count(written.num_images, 'image')} by {model.origin.fingerprint}{bad}")
    for name in written.files:
        print_lines(f"  {name}")
    if written.training:
        print_lines(f"to train on these labels: {written.training}")
    return WRONG_INPUT if written.bad else DONE


def why_not_written(out: Path, run_dir: Path, force: bool) -> str | None:
    """Why nothing may be written to a folder; None if it may."""
    if out.resolve() == run_dir.resolve() or run_dir.resolve() in out.resolve().parents:
        return f"--out: {out} lies in the run's directory, which stays as it is"
    if out.exists() and not out.is_dir():
        return f"--out: {out} is no folder"
    if out.is_dir() and any(out.iterdir()) and not force:
        return f"--out: {out} is not empty; --force writes into it, over files of the same names"
    return None
