"""The command line: parses, calls, sets the exit code."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mtl import __version__

if TYPE_CHECKING:
    from mtl.assembly import Parts
    from mtl.config import RunConfig
    from mtl.distributed import World
    from mtl.outcome import Outcome

DONE, FAILED, WRONG_INPUT, VIOLATION = 0, 1, 2, 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb.

    Returns:
        0 done; 2 the user's input is wrong; 3 the audit found a violation. Anything else is raised, which makes 1.
    """
    parser, verbs = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes key=value pairs only in one piece; those behind an option come back as the rest.
    unknown = [
        argument for argument in rest if argument.startswith("-") or options.verb in ("report", "audit", "bench")
    ]
    if unknown:
        verbs[options.verb].error(f"unrecognized arguments: {' '.join(unknown)}")
    if options.verb == "bench":
        return _bench(options.quick, options.json, options.plot)
    if options.verb == "report":
        return _report(options.run_dir, options.picture)
    if options.verb == "audit":
        return _audit(options.paths, options.freeze, options.json)
    if options.verb == "plan":
        return _plan(options, [*options.overrides, *rest])
    return _train(options.config, [*options.overrides, *rest], options.quiet)


def _parser() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """The whole command line, and the part of each verb."""
    parser = argparse.ArgumentParser(prog="mtl", description="Multi-task learning with freezes that are proven.")
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


def _train(file: Path, overrides: Sequence[str], quiet: bool) -> int:
    """Trains through the phases of CONFIG, proves what they froze, and writes a run directory."""
    from mtl.config import load_config
    from mtl.config.source import ConfigError
    from mtl.run_dir import check_run_dir

    # The configuration is checked before torch and timm are loaded, which takes seconds.
    try:
        config = load_config(file, overrides)
        check_run_dir(config)
    except ConfigError as error:
        return _complain(error)

    from mtl.assembly import assemble
    from mtl.audit import AuditError
    from mtl.checkpoint import SaveError
    from mtl.console import logger, show_log
    from mtl.data import DataError
    from mtl.disk import is_full
    from mtl.distributed import World, WorldError, is_lost
    from mtl.interrupt import Stopped
    from mtl.outofmemory import in_words, is_out_of_memory
    from mtl.plan.text import short_plan
    from mtl.resume import find_origin, settled
    from mtl.run import audit_file, train

    parts = None
    try:
        world = World.from_environment()
        show_log(quiet or not world.leads, only_errors=not world.leads)
        origin = find_origin(config)
        config = config if origin is None else settled(config, origin)
        parts = assemble(config, quiet, world, begins=origin is None)
        logger.info(short_plan(parts.plan))
        outcome = train(parts, quiet, world)
    except (ConfigError, WorldError) as error:
        return _complain(error)
    except AuditError as error:
        sys.stderr.write(f"audit: {error}\nSee {audit_file(config.run_dir, world)}\n")
        return VIOLATION
    except (DataError, FloatingPointError, SaveError) as error:
        return _complain(error) if parts is None else _fail(config, f"error: {error}")
    except (Stopped, KeyboardInterrupt) as reason:
        return _fail(config, f"\n{str(reason) or 'stopped'}")
    except (OSError, RuntimeError, MemoryError) as error:
        if is_full(error):
            return _fail(config, f"error: the disk is full: {error}")
        if is_lost(error):
            return _fail(config, f"error: another process of this run has ended; what it said says why ({error})")
        if not is_out_of_memory(error):
            raise
        return _fail(config, f"error: {in_words(error, None if parts is None else parts.plan)}")
    return _close(config, parts, outcome, world)


def _close(config: RunConfig, parts: Parts, outcome: Outcome, world: World) -> int:
    """Says what a run came to, and parts from the other processes."""
    from mtl.console import logger
    from mtl.report import write_report
    from mtl.run_files import RunFileError
    from mtl.summary import closing_line, results_table, verdict

    is_clean = not world.agree(broken=not outcome.report.ok).broken
    if world.leads:
        logger.info("\n".join([results_table(outcome), verdict(outcome), closing_line(outcome)]))
        if outcome.report.ok and not is_clean:
            logger.error(f"audit: another process found the freeze broken: {config.run_dir}/audit.rank-N.json")
        # Last, since all else is on disk by now: a drawing that fails costs nothing.
        kept = "last" if math.isnan(outcome.best_score) else "{best,last}"
        files = [f"checkpoints/{kept}", "metrics.jsonl", "audit.json", "plan.json", "config.yaml"]
        try:
            files.insert(0, write_report(parts, outcome.run_dir).name)
        except (OSError, RunFileError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            logger.warning(f"report.html cannot be written ({reason}); later: mtl report {outcome.run_dir}")
        logger.info(f"{outcome.run_dir}: {', '.join(files)}")
    # torchrun ends all processes as soon as one has failed.
    world.barrier()
    world.close()
    return DONE if is_clean else VIOLATION


def _fail(config: RunConfig, why: str) -> int:
    """Says why a run ended early, and how it goes on."""
    is_saved = (config.run_dir / "checkpoints" / "last").exists()
    how = "to go on: the same command with resume=auto" if is_saved else "nothing was saved yet"
    sys.stderr.write(f"{why}\n{how}\n")
    return FAILED


def _plan(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Shows what every phase of CONFIG freezes, trains and costs, without weights, data or training."""
    from mtl.config import load_config
    from mtl.config.source import ConfigError

    for name in ("world_size", "epochs"):
        if (number := getattr(options, name)) is not None and number < 1:
            return _complain(ValueError(f"--{name.replace('_', '-')}: expected 1 or more, got {number}"))
    others = [name for name in ("json", "params", "plot", "world_size") if getattr(options, name)]
    if options.generate and others:
        return _complain(ValueError(f"--generate only writes phases; leave out --{others[0].replace('_', '-')}"))
    if options.epochs and not options.generate:
        return _complain(ValueError("--epochs is the length of phases that --generate writes"))
    try:
        config = load_config(options.config, overrides)
    except ConfigError as error:
        return _complain(error)

    from mtl.blueprint import draw_up_without_weights
    from mtl.plan import make_plan
    from mtl.plan.generate import generate_config
    from mtl.plan.picture import draw_plan
    from mtl.plan.text import full_plan, parameter_map

    try:
        if options.generate:
            command = ["mtl", "plan", str(options.config), *overrides, "--generate", options.generate]
            command += ["--epochs", str(options.epochs)] if options.epochs else []
            sys.stdout.write(generate_config(options.generate, config, command, options.epochs or 1))
            return DONE
        blueprint = draw_up_without_weights(config)
        plan = make_plan(blueprint, options.world_size or 1, with_forecast=True)
    except ConfigError as error:
        return _complain(error)
    sys.stderr.writelines(f"warning: {line}\n" for line in blueprint.unread)
    if options.plot is not None:
        try:
            draw_plan(plan, options.plot)
        except (ValueError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            return _complain(ValueError(f"--plot: {options.plot} cannot be written: {reason}"))
        sys.stderr.write(f"{options.plot}\n")
    if options.json:
        sys.stdout.write(json.dumps(plan.to_json(names=options.params), indent=2) + "\n")
    else:
        sys.stdout.write((parameter_map(plan) if options.params else full_plan(plan)) + "\n")
    return DONE


def _audit(paths: Sequence[Path], freeze: Sequence[str] | None, as_json: bool) -> int:
    """Proves a finished run again from its own files, or tells which tensors of two checkpoints differ in a bit."""
    if len(paths) > 2 or (len(paths) == 1 and freeze):
        return _complain(ValueError("expected a run directory alone, or two checkpoints and --freeze PATTERN ..."))

    from mtl.audit.cold import audit_run
    from mtl.audit.compare import compare_checkpoints
    from mtl.patterns import PatternError
    from mtl.run_files import RunFileError
    from mtl.tensor_file import UnreadableError

    try:
        result = audit_run(paths[0]) if len(paths) == 1 else compare_checkpoints(paths[0], paths[1], freeze or ["**"])
    except PatternError as error:
        return _complain(ValueError(f"{error}; a checkpoint has names, but no positions, depth groups or classes"))
    except (RunFileError, UnreadableError) as error:
        return _complain(error)
    sys.stdout.write((json.dumps(result.to_json(), indent=2) if as_json else str(result)) + "\n")
    if result.is_broken:
        return VIOLATION
    # What was not proven is not clean, and no violation either.
    return DONE if result.ok else FAILED


def _bench(quick: bool, as_json: bool, plot: Path | None) -> int:
    """Times epochs of three loops in turn: the naive one, mtl's, and one on features extracted by hand."""
    if plot is not None and (plot.suffix.lower() not in (".png", ".pdf", ".svg") or not plot.parent.is_dir()):
        return _complain(ValueError(f"--plot: expected a .png, .pdf or .svg in a folder that is there, got {plot}"))

    from mtl.bench import bench, draw, in_words, to_json

    def tell(line: str) -> None:
        sys.stderr.write(f"{line}\n")

    rows = bench(quick, tell)
    sys.stdout.write((json.dumps(to_json(rows), indent=2) if as_json else in_words(rows)) + "\n")
    if plot is not None:
        try:
            draw(rows).savefig(plot)
        except OSError as error:
            return _complain(ValueError(f"--plot: {plot} cannot be written: {error.strerror}"))
        sys.stderr.write(f"{plot}\n")
    return DONE


def _report(run_dir: Path, picture: Path | None) -> int:
    """Writes RUN_DIR/report.html: what was trained, what came out, and what the audit proved."""
    from mtl.config import load_config
    from mtl.config.source import ConfigError

    needed = ["config.yaml", "metrics.jsonl", "audit.json", "checkpoints/last/state.json"]
    missing = [name for name in needed if not (run_dir / name).is_file()]
    if missing:
        return _complain(ValueError(f"{run_dir} is no finished run: it lacks {', '.join(missing)}"))

    if picture is not None and picture.suffix.lower() != ".png":
        return _complain(ValueError(f"--picture: expected a name that ends in .png, got {picture}"))

    from mtl.assembly import assemble
    from mtl.data import DataError
    from mtl.report import write_report
    from mtl.run_files import RunFileError

    try:
        # Only the architecture is needed: the weights are the run's own.
        parts = assemble(load_config(run_dir / "config.yaml", ["trunk.weights=none", "device=auto"]))
    except (ConfigError, DataError) as error:
        return _complain(error)
    try:
        page = write_report(parts, run_dir, picture)
    except RunFileError as error:
        return _complain(error)
    except OSError as error:
        return _complain(ValueError(f"{error.filename or run_dir} cannot be written: {error.strerror}"))
    sys.stdout.write(f"{page}\n")
    return DONE


def _complain(error: Exception) -> int:
    for line in str(error).splitlines():
        sys.stderr.write(f"error: {line}\n")
    return WRONG_INPUT
