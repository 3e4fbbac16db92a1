"""The command line: parses, calls, sets the exit code."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtl.cli.guard import DONE, FAILED, VIOLATION, WRONG_INPUT, Attempt, guarded
from mtl.runtime.console import say, tell
from mtl.runtime.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb.

    Returns:
        0 done; 2 the user's input is wrong; 3 the audit found a violation; 1 anything else. Errors of ours are raised,
        which makes 1.
    """
    return guarded(lambda attempt: _run(arguments, attempt))


def _run(arguments: Sequence[str] | None, attempt: Attempt) -> int:
    parser, verbs = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes key=value pairs only in one piece; those behind an option come back as the rest.
    unknown = [
        argument for argument in rest if argument.startswith("-") or options.verb in ("report", "audit", "bench")
    ]
    if unknown:
        verbs[options.verb].error(f"unrecognized arguments: {' '.join(unknown)}")
    match options.verb:
        case "bench":
            return _bench(options.quick, options.json, options.plot)
        case "report":
            return _report(options.run_dir, options.picture)
        case "audit":
            return _audit(options.paths, options.freeze, options.json)
        case "plan":
            return _plan(options, [*options.overrides, *rest])
        case _:
            return _train(options, [*options.overrides, *rest], attempt)


class _Parser(argparse.ArgumentParser):
    def _print_message(self, message: str, file: Any = None) -> None:
        """Argparse itself drops what cannot be written."""
        (say if file is sys.stdout else tell)(message)


def _parser() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """The whole command line, and the part of each verb."""
    parser = _Parser(prog="mtl", description="Multi-task learning with freezes that are proven.")
    parser.add_argument("--version", action="version", version=f"mtl {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    train = verbs.add_parser("train", help="train a configuration", description=_train.__doc__)
    train.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file, such as configs/scenes.yaml")
    train.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as optim.lr_scale=0.5 phases.finetune.epochs=2"
    )
    train.add_argument("-q", "--quiet", action="store_true", help="show nothing but warnings and errors")
    plan = verbs.add_parser(
        "plan", help="what every phase freezes and costs, without training", description=_plan.__doc__
    )
    plan.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file, such as configs/scenes.yaml")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="as for train")
    plan.add_argument("--params", action="store_true", help="list every parameter in every phase")
    plan.add_argument("--json", action="store_true", help="print plain data; with --params, with all names")
    plan.add_argument("--plot", type=Path, metavar="FILE", help="draw parameters x phases into a picture as well")
    plan.add_argument("--world-size", type=int, metavar="N", help="processes that reduce gradients")
    plan.add_argument(
        "--generate", choices=("gradual", "top-down", "alternate", "one-at-a-time"), help="write phases as YAML instead"
    )
    plan.add_argument("--epochs", type=int, metavar="N", help="with --generate: length of each phase, 1 if not given")
    audit = verbs.add_parser("audit", help="prove a run, or compare two checkpoints", description=_audit.__doc__)
    audit.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="a run directory, or two checkpoints")
    audit.add_argument(
        "--freeze", nargs="+", metavar="PATTERN", help="what has to be the same; everything if not given"
    )
    audit.add_argument("--json", action="store_true", help="print plain data")
    bench = verbs.add_parser("bench", help="what a freeze pays, measured here", description=_bench.__doc__)
    bench.add_argument("--quick", action="store_true", help="fewer settings and rounds, under three minutes")
    bench.add_argument("--json", action="store_true", help="print plain data")
    bench.add_argument("--plot", type=Path, metavar="FILE", help="draw the times into a picture as well")
    report = verbs.add_parser("report", help="write the report of a run again", description=_report.__doc__)
    report.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="such as runs/scenes")
    report.add_argument("--picture", type=Path, metavar="FILE", help="put the report's picture into a PNG file as well")
    return parser, verbs.choices


def _train(options: argparse.Namespace, overrides: Sequence[str], attempt: Attempt) -> int:
    """Trains through the phases of CONFIG, proves what they froze, and writes a run directory."""
    from mtl.cli.train import run_config

    _, is_clean = run_config(options.config, overrides, options.quiet, attempt)
    return DONE if is_clean else VIOLATION


def _plan(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Shows what every phase of CONFIG freezes, trains and costs, without weights, data or training."""
    from mtl.config import load_config

    for name in ("world_size", "epochs"):
        if (number := getattr(options, name)) is not None and number < 1:
            return _complain(f"--{name.replace('_', '-')}: expected 1 or more, got {number}")
    others = [name for name in ("json", "params", "plot", "world_size") if getattr(options, name)]
    if options.generate and others:
        return _complain(f"--generate only writes phases; leave out --{others[0].replace('_', '-')}")
    if options.epochs and not options.generate:
        return _complain("--epochs is the length of phases that --generate writes")
    config = load_config(options.config, overrides)

    from mtl.phases.plan import make_plan
    from mtl.phases.plan.generate import generate_config
    from mtl.phases.plan.picture import draw_plan
    from mtl.phases.plan.text import full_plan, parameter_map
    from mtl.phases.setup import build_meta_setup

    if options.generate:
        command = ["mtl", "plan", str(options.config), *overrides, "--generate", options.generate]
        command += ["--epochs", str(options.epochs)] if options.epochs else []
        say(generate_config(options.generate, config, command, options.epochs or 1))
        return DONE
    model_setup = build_meta_setup(config)
    plan = make_plan(model_setup, options.world_size or 1, with_forecast=True)
    for line in model_setup.unread:
        tell(f"warning: {line}")
    if options.plot is not None:
        try:
            draw_plan(plan, options.plot)
        except (ValueError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            return _complain(f"--plot: {options.plot} cannot be written: {reason}")
        tell(str(options.plot))
    if options.json:
        say(json.dumps(plan.to_json(names=options.params), indent=2))
    else:
        say(parameter_map(plan) if options.params else full_plan(plan))
    return DONE


def _audit(paths: Sequence[Path], freeze: Sequence[str] | None, as_json: bool) -> int:
    """Proves a finished run again from its own files, or tells which tensors of two checkpoints differ in a bit."""
    if len(paths) > 2 or (len(paths) == 1 and freeze):
        return _complain("expected a run directory alone, or two checkpoints and --freeze PATTERN ...")

    from mtl.audit.offline.compare import compare_checkpoints
    from mtl.audit.offline.run import audit_run
    from mtl.patterns import PatternError

    try:
        result = audit_run(paths[0]) if len(paths) == 1 else compare_checkpoints(paths[0], paths[1], freeze or ["**"])
    except PatternError as error:
        return _complain(f"{error}; a checkpoint has names, but no positions, depth groups or classes")
    say(json.dumps(result.to_json(), indent=2) if as_json else str(result))
    if result.is_broken:
        return VIOLATION
    # What was not proven is not clean, and no violation either.
    return DONE if result.ok else FAILED


def _bench(quick: bool, as_json: bool, plot: Path | None) -> int:
    """Times epochs of three loops in turn: the naive one, mtl's, and one on features extracted by hand."""
    if plot is not None and (plot.suffix.lower() not in (".png", ".pdf", ".svg") or not plot.parent.is_dir()):
        return _complain(f"--plot: expected a .png, .pdf or .svg in a folder that is there, got {plot}")

    from mtl.results.bench import bench, draw, in_words, to_json

    rows = bench(quick, tell)
    say(json.dumps(to_json(rows), indent=2) if as_json else in_words(rows))
    if plot is not None:
        try:
            draw(rows).savefig(plot)
        except OSError as error:
            return _complain(f"--plot: {plot} cannot be written: {error.strerror}")
        tell(str(plot))
    return DONE


def _report(run_dir: Path, picture: Path | None) -> int:
    """Writes RUN_DIR/report.html: what was trained, what came out, and what the audit proved."""
    needed = ["config.yaml", "metrics.jsonl", "audit.json", "checkpoints/last/state.json"]
    missing = [name for name in needed if not (run_dir / name).is_file()]
    if missing:
        return _complain(f"{run_dir} is no finished run: it lacks {', '.join(missing)}")
    if picture is not None and picture.suffix.lower() != ".png":
        return _complain(f"--picture: expected a name that ends in .png, got {picture}")

    from mtl.config import load_config
    from mtl.results.report import write_report
    from mtl.training.setup import assemble

    # Only the architecture is needed: the weights are the run's own.
    parts = assemble(load_config(run_dir / "config.yaml", ["trunk.weights=none", "device=auto"]))
    try:
        page = write_report(parts, run_dir, picture)
    except OSError as error:
        return _complain(f"{error.filename or run_dir} cannot be written: {error.strerror}")
    say(str(page))
    return DONE


def _complain(said: object) -> int:
    for line in str(said).splitlines():
        tell(f"error: {line}")
    return WRONG_INPUT
