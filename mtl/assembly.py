"""From a configuration to the parts of a run, with everything checked and nothing written."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from mtl.blueprint import Blueprint, draw_up, draw_up_without_weights
from mtl.config import RunConfig, SettingError, mistake_of
from mtl.console import logger
from mtl.data import Split, load_data
from mtl.model import start_from
from mtl.optim import try_out
from mtl.plan import Plan, make_plan
from mtl.trial import choose
from mtl.validation import Scores, validate_constant


@dataclass(frozen=True)
class Parts(Blueprint):
    """The parts of a run.

    Attributes:
        device: Where the run computes.
        train: Training data.
        val: Validation data.
        trivial: Metrics of the trivial predictor, which gives one constant output per task.
        plan: What every phase freezes, trains and costs.
    """

    device: torch.device
    train: Split
    val: Split
    trivial: Scores
    plan: Plan


def assemble(config: RunConfig, quiet: bool = False) -> Parts:
    """Makes the parts of a run. Generated data may be put in the data cache; nothing else is written.

    Args:
        config: The run.
        quiet: Whether to show no progress bar while data is made.

    Raises:
        ConfigError: Anything in the configuration that turns out not to work, with the place where it was written.
        DataError: The data cannot be had.
    """
    device = _device(config)
    # Without weights first: what is wrong with the configuration is found before any are loaded.
    plan = make_plan(draw_up_without_weights(config))
    blueprint = draw_up(config)
    tasks = blueprint.tasks
    try:
        train, val = load_data(config.data, tasks, quiet)
    except SettingError as error:
        raise mistake_of(config, error) from error
    constants = {name: task.fit(train.labels[name]) for name, task in tasks.items()}
    for name, constant in constants.items():
        start_from(blueprint.model.heads[name], constant)
    trivial = validate_constant(tasks, constants, val, config.data.batch_size)
    _try_out_optimizers(blueprint, device)
    blueprint.root.to(device)
    choice = choose(blueprint, train.batch(torch.arange(min(config.data.batch_size, len(train)))).to(device), device)
    if choice.why:
        logger.info(choice.why)
    blueprint = replace(
        blueprint, config=config.with_changes(memory_format=choice.memory_format, precision=choice.precision)
    )
    return Parts(**vars(blueprint), device=device, train=train, val=val, trivial=trivial, plan=plan)


def _try_out_optimizers(blueprint: Blueprint, device: torch.device) -> None:
    config, tried = blueprint.config, set[str]()
    for phase, written in zip(blueprint.phases, config.written_phases, strict=True):
        optimizer = phase.optim.optimizer
        if phase.config.evaluate_only or optimizer.model_dump_json() in tried:
            continue
        tried.add(optimizer.model_dump_json())
        try:
            try_out(optimizer, device)
        except SettingError as error:
            raise config.mistake((*config.path_of(written, "optimizer"), "options"), error.message) from error


def _device(config: RunConfig) -> torch.device:
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(config.device)
    there = {"cpu": True, "cuda": torch.cuda.is_available()}[device.type]
    if not there or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        raise config.mistake(("device",), f"there is no device {config.device!r} here; use auto or cpu")
    return device
