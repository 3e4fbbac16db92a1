"""From a configuration to the parts of a run, with everything checked and nothing written."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.modules.batchnorm import _NormBase

from mtl.blueprint import Blueprint, draw_up, draw_up_without_weights
from mtl.config import RunConfig, SettingError, mistake_of
from mtl.data import Split, load_data
from mtl.model import start_from
from mtl.plan import Plan, make_plan
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
    _check_batch_sizes(blueprint, len(train))
    blueprint.root.to(device)
    return Parts(**vars(blueprint), device=device, train=train, val=val, trivial=trivial, plan=plan)


def _check_batch_sizes(blueprint: Blueprint, num_train: int) -> None:
    if not any(isinstance(module, _NormBase) for module in blueprint.root.modules()):
        return
    for phase in blueprint.phases:
        if min(phase.batch_size, num_train) == 1 and not phase.config.evaluate_only:
            raise blueprint.config.mistake(
                ("data", "batch_size"), "expected batches of two images or more: BatchNorm cannot train on one"
            )


def check_run_dir(config: RunConfig) -> None:
    """Raises `ConfigError` if the run directory is taken or cannot be made."""
    run_dir = config.run_dir
    if run_dir.exists() and not run_dir.is_dir():
        raise config.mistake(("name",), f"{run_dir} is a file; expected a directory, or nothing yet")
    if run_dir.is_dir() and any(run_dir.iterdir()):
        number = 2
        while config.run_dir.with_name(f"{config.name}-{number}").exists():
            number += 1
        raise config.mistake(
            ("name",), f"{run_dir} already holds a run; give this one another name, such as name={config.name}-{number}"
        )
    parent = next(folder for folder in [run_dir, *run_dir.absolute().parents] if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise config.mistake(
            ("runs_dir",), f"{run_dir} cannot be made: {parent} is not a directory that you may write to"
        )


def _device(config: RunConfig) -> torch.device:
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(config.device)
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}[device.type]
    if not there or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        raise config.mistake(("device",), f"there is no device {config.device!r} here; use auto or cpu")
    return device


def make_run_dir(config: RunConfig) -> Path:
    """Makes the run directory and claims it: of two runs that start at once, one gets it.

    Raises:
        ConfigError: It cannot be made, or another run has it.
    """
    try:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        (config.run_dir / "config.yaml").touch(exist_ok=False)
    except FileExistsError as error:
        raise config.mistake(("name",), f"{config.run_dir} was taken by another run just now") from error
    except OSError as error:
        raise config.mistake(("runs_dir",), f"{config.run_dir} cannot be made: {error.strerror}") from error
    return config.run_dir
