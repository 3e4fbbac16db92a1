"""`mtl export`: a trained model into files for other programs."""

from __future__ import annotations

import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from mtl.cli.eval import named_tasks
from mtl.cli.verb import DONE, FAILED, refuse
from mtl.runtime.console import print_err, print_lines

if TYPE_CHECKING:
    import argparse

    from mtl.cli.guard import Attempt
    from mtl.cli.verb import Verbs
    from mtl.results.export import Exported

_ONNX = ("onnx", "onnxscript", "onnxruntime")


def add_parser(verbs: Verbs) -> None:
    """Adds the verb to the command line."""
    parser = verbs.add_parser("export", help="write a trained model for other programs", description=run.__doc__)
    parser.set_defaults(run=run)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="such as runs/scenes")
    parser.add_argument(
        "--format",
        required=True,
        choices=("timm", "safetensors", "torch", "onnx"),
        help="the trunk's weights for timm, all weights, a program of torch.export, or ONNX",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="a new folder")
    parser.add_argument("--tasks", metavar="NAME,...", help="leave out the heads of other tasks")
    parser.add_argument("--split", action="store_true", help="torch, onnx: a file for the trunk and for each head")
    parser.add_argument("--which", metavar="best|last|STEP", help="the checkpoint; by default the best one")
    parser.add_argument(
        "--input", choices=("uint8", "float"), help="torch, onnx: images from 0 to 255 (by default) or from 0 to 1"
    )
    parser.add_argument(
        "--size", nargs=2, type=int, metavar=("H", "W"), help="torch, onnx: the image size; by default the run's"
    )
    parser.add_argument("--force", action="store_true", help="replace an earlier export in DIR")


def run(options: argparse.Namespace, _: Attempt) -> int:
    """Writes the model of RUN_DIR into files, with a model card, after a comparison of what they compute with what the
    model does. RUN_DIR is not changed.
    """
    if reason := _misfit(options):
        return refuse(reason)

    from mtl.results.export import ExportError, export
    from mtl.results.export.folder import check_out
    from mtl.results.run_choice import read_run
    from mtl.results.trained import load_as

    check_out(options.out, options.run_dir, options.force)
    size = [f"data.image_size=[{options.size[0]},{options.size[1]}]"] if options.size else []
    model = load_as(options.run_dir, read_run(options.run_dir, size), options.which)
    command = shlex.join(["mtl", *sys.argv[1:]])
    try:
        made = export(
            model,
            options.out,
            options.format,
            named_tasks(options.tasks),
            options.split,
            options.input or "uint8",
            command,
        )
    except ExportError as error:
        print_err(f"error: {error}")
        return FAILED
    print_lines(_as_text(made))
    return DONE


def _misfit(options: argparse.Namespace) -> str:
    """Why the options do not go together, or not with what is installed."""
    given = {"--input": options.input, "--size": options.size, "--split": options.split}
    for name, value in given.items():
        if value and options.format in ("timm", "safetensors"):
            return f"{name}: {options.format} has weights alone; it goes with --format torch or onnx"
    if options.tasks is not None and options.format == "timm":
        return "--tasks: timm has the trunk alone; leave it out"
    if options.size and min(options.size) < 1:
        return f"--size: expected a height and a width above 0, got {options.size[0]} {options.size[1]}"
    missing = [name for name in _ONNX if find_spec(name) is None]
    if options.format == "onnx" and missing:
        return f"--format onnx needs {', '.join(missing)}; install the extra `onnx`: pip install 'mtl-freeze[onnx]'"
    return ""


def _as_text(made: Exported) -> str:
    from mtl.runtime.text import in_bytes

    written, subject = made.written, made.subject
    sizes = {name: (made.folder / name).stat().st_size for name in made.files}
    opset = f", opset {written.opset}" if written.opset else ""
    lines = [f"{made.folder}: {', '.join(f'{name} ({in_bytes(size)})' for name, size in sizes.items())}{opset}"]
    if written.call:
        lines += [f"load: {written.call}"]
    elif written.sizes is not None:
        outputs = ", ".join(name if task == name else f"{name} ({task})" for task, name in subject.names.items())
        lines += [f'input: images, {subject.input}, "b {subject.network.channels} h w"; any batch, {written.sizes}']
        lines += [f"outputs: {outputs}"]
    worst = max(check.worst for check in written.checks)
    checks = "; ".join(map(str, written.checks))
    lines += [f"parity: {worst:.2g} at most, limit {written.limit:g}: {checks}; {subject.images.origin}"]
    return "\n".join(lines)
