"""`mtl plan`: what every phase of a configuration freezes, trains and costs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mtl.cli.verb import DONE, refuse
from mtl.runtime.collection import without_collection
from mtl.runtime.console import line_width, print_err, print_lines, print_out

if TYPE_CHECKING:
    import argparse

    from mtl.cli.guard import Attempt
    from mtl.cli.verb import Verbs
    from mtl.config import RunConfig


def add_parser(verbs: Verbs) -> None:
    """Adds the verb to the command line."""
    parser = verbs.add_parser(
        "plan", help="what every phase freezes and costs, without training", description=run.__doc__
    )
    parser.set_defaults(run=run)
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file, or a name such as scenes")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for train")
    parser.add_argument("--params", action="store_true", help="list every parameter in every phase")
    parser.add_argument("--json", action="store_true", help="print plain data; with --params, with all names")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw parameters x phases into a picture as well")
    parser.add_argument("--world-size", type=int, metavar="N", help="processes that reduce gradients")
    parser.add_argument(
        "--generate", choices=("gradual", "top-down", "alternate", "one-at-a-time"), help="write phases as YAML instead"
    )
    parser.add_argument("--epochs", type=int, metavar="N", help="with --generate: length of each phase, 1 if not given")


def run(options: argparse.Namespace, _: Attempt) -> int:
    """Shows what every phase of CONFIG freezes, trains and costs, without weights, data or training."""
    for name in ("world_size", "epochs"):
        if (number := getattr(options, name)) is not None and number < 1:
            return refuse(f"--{name.replace('_', '-')}: expected 1 or more, got {number}")
    others = [name for name in ("json", "params", "plot", "world_size") if getattr(options, name)]
    if options.generate and others:
        return refuse(f"--generate only writes phases; leave out --{others[0].replace('_', '-')}")
    if options.epochs and not options.generate:
        return refuse("--epochs is the length of phases that --generate writes")

    from mtl.config import load_config

    config = load_config(options.config, options.overrides)
    with without_collection():
        return _generate(options, config) if options.generate else _show(options, config)


def _generate(options: argparse.Namespace, config: RunConfig) -> int:
    from mtl.phases.plan.generate import generate_config

    command = ["mtl", "plan", str(options.config), *options.overrides, "--generate", options.generate]
    command += ["--epochs", str(options.epochs)] if options.epochs else []
    print_out(generate_config(options.generate, config, command, options.epochs or 1))
    return DONE


def _show(options: argparse.Namespace, config: RunConfig) -> int:
    from mtl.phases.plan import make_plan
    from mtl.phases.plan.picture import draw_plan
    from mtl.phases.plan.text import full_plan, parameter_map
    from mtl.phases.setup import build_meta_setup
    from mtl.runtime.uncompiled import without_compiler

    with without_compiler():
        model_setup = build_meta_setup(config)
        plan = make_plan(model_setup, options.world_size or 1, with_forecast=True)
    for line in model_setup.unread:
        print_err(f"warning: {line}")
    if options.plot is not None:
        try:
            draw_plan(plan, options.plot)
        except (ValueError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            return refuse(f"--plot: {options.plot} cannot be written: {reason}")
        print_err(str(options.plot))
    if options.json:
        print_out(json.dumps(plan.to_json(names=options.params), indent=2))
    else:
        print_lines((parameter_map if options.params else full_plan)(plan, line_width(sys.stdout)))
    return DONE
