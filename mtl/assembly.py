"""From a configuration to the parts of a run, with everything checked and nothing written."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mtl.balance import Balance, build_balance
from mtl.config import PhaseConfig, RunConfig
from mtl.data import BUILT_IN, Split, load_data
from mtl.freeze import FreezeError, FreezePlan, plan_freeze, trainable_parameters
from mtl.model import MultiTaskModel, WeightsError, start_from
from mtl.moduletree import describe
from mtl.optim import LearningRateError, group_parameters, rates
from mtl.patterns import PatternError
from mtl.tasks import Task, build_tasks
from mtl.yaml_source import KeyPath


@dataclass(frozen=True)
class Phase:
    """A phase with its patterns resolved.

    Attributes:
        config: What the user wrote.
        plan: What it freezes.
        parameters: What the run's optimizer trains, by name.
        groups: Those parameters in groups, with peak learning rate and weight decay.
    """

    config: PhaseConfig
    plan: FreezePlan
    parameters: dict[str, nn.Parameter]
    groups: list[dict[str, Any]]


@dataclass(frozen=True)
class Parts:
    """The parts of a run.

    Attributes:
        config: The configuration they were made from.
        device: Where the run computes.
        tasks: The tasks by name.
        model: Trunk and heads.
        balance: The balancing method.
        root: One module around all that has parameters, under the names that users write: trunk, heads, balance.
        phases: The phases, resolved.
        train: Training data.
        val: Validation data.
        constants: The trivial predictor's output for each task.
    """

    config: RunConfig
    device: torch.device
    tasks: dict[str, Task]
    model: MultiTaskModel
    balance: Balance
    root: nn.Module
    phases: list[Phase]
    train: Split
    val: Split
    constants: dict[str, Tensor]


def assemble(config: RunConfig, quiet: bool = False) -> Parts:
    """Makes the parts of a run. Generated data may be put in the data cache; nothing else is written.

    The model's initial weights follow from the run's seed.

    Args:
        config: The run.
        quiet: Whether to show no progress bar while data is made.

    Raises:
        ConfigError: Anything in the configuration that turns out not to work, with the place where it was written.
        DataError: The data cannot be had.
    """
    device = _device(config)
    _check_labels(config)
    _seed_everything(config.seed)
    tasks = build_tasks(config.tasks)
    model = _build_model(config, tasks)
    try:
        balance = build_balance(config.balance, list(tasks))
    except ValueError as error:
        raise config.mistake(*_split_message(error)) from error
    root = nn.ModuleDict({**dict(model.named_children()), "balance": balance})
    phases = [_resolve(config, index, root, balance) for index in range(len(config.phases))]

    train, val = load_data(config.data, tasks, quiet)
    constants = {name: task.fit(train.labels[name]) for name, task in tasks.items()}
    for name, constant in constants.items():
        start_from(model.heads[name], constant)
    root.to(device)
    if config.memory_format == "channels_last":
        model.to(memory_format=torch.channels_last)
    return Parts(config, device, tasks, model, balance, root, phases, train, val, constants)


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


def _check_labels(config: RunConfig) -> None:
    data = BUILT_IN.get(config.data.name)
    if data is None:
        near = get_close_matches(config.data.name, BUILT_IN, n=1)
        raise config.mistake(
            ("data", "name"),
            f"no data set {config.data.name!r}; there are: {', '.join(BUILT_IN)}"
            + (f"; nearest: {near[0]}" if near else ""),
        )
    for task in config.tasks:
        if task not in data.labels:
            near = get_close_matches(task, data.labels, n=1)
            raise config.mistake(
                ("tasks", task),
                f"{config.data.name} has no labels of that name; it has: {', '.join(data.labels)}"
                + (f"; nearest: {near[0]}" if near else ""),
            )


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _build_model(config: RunConfig, tasks: dict[str, Task]) -> MultiTaskModel:
    try:
        return MultiTaskModel(config.trunk, tasks, config.data.image_size)
    except (WeightsError, ValueError) as error:
        raise config.mistake(*_split_message(error)) from error


def _split_message(error: Exception) -> tuple[KeyPath, str]:
    """The key and the rest of a message that starts with `some.key: `."""
    key, _, message = str(error).partition(": ")
    return tuple(key.split(".")), message


def _resolve(config: RunConfig, index: int, root: nn.Module, balance: Balance) -> Phase:
    phase = config.phases[index]
    classic = config.MODEL.NOT_TRAIN_IN_MULTI_TASK
    try:
        plan = plan_freeze(root, config.freeze_patterns(phase))
    except PatternError as error:
        in_classic = error.index < len(classic)
        path: KeyPath = ("MODEL", "NOT_TRAIN_IN_MULTI_TASK", error.index)
        raise config.mistake(
            path if in_classic else ("phases", index, "freeze", error.index - len(classic)), str(error)
        ) from error
    except FreezeError as error:
        raise config.mistake(("phases", index, "freeze"), str(error)) from error
    if all(name.startswith("balance.") for name in plan.names.trainable):
        raise config.mistake(
            ("phases", index, "freeze"), f"phase {phase.name!r} trains nothing: every parameter is frozen"
        )
    steps_itself = {id(parameter) for group in balance.param_groups for parameter in group["params"]}
    parameters = {n: p for n, p in trainable_parameters(root, plan).items() if id(p) not in steps_itself}
    lr = config.optim.lr if phase.lr is None else phase.lr
    every_name = [*plan.names.frozen, *plan.names.trainable]
    try:
        lr_of = rates(lr, list(parameters), every_name, config.optim.lr, describe(root))
    except (PatternError, LearningRateError) as error:
        key = [list(lr)[error.index]] if isinstance(error, PatternError) and isinstance(lr, dict) else []
        raise config.mistake(("phases", index, "lr", *key), str(error)) from error
    return Phase(phase, plan, parameters, group_parameters(config.optim, parameters, lr_of))


def plan_summary(phases: Sequence[Phase], root: nn.Module) -> dict[str, Any]:
    """The content of `plan.json`: what every phase freezes and trains."""
    sizes = {name: (p.numel(), p.numel() * p.element_size()) for name, p in root.named_parameters()}

    def side(names: Sequence[str]) -> dict[str, int]:
        known = [sizes[name] for name in names if name in sizes]
        return {
            "count": len(known),
            "parameters": sum(number for number, _ in known),
            "bytes": sum(size for _, size in known),
        }

    return {
        "phases": [
            {
                "name": phase.config.name,
                "freeze": list(phase.plan.patterns),
                "frozen": side(phase.plan.names.frozen),
                "trainable": side(phase.plan.names.trainable),
                "frozen_buffers": len(phase.plan.names.frozen_buffers),
                "optimizer_groups": [
                    {
                        "lr": group["lr"],
                        "weight_decay": group["weight_decay"],
                        "count": len(group["params"]),
                        "parameters": sum(p.numel() for p in group["params"]),
                    }
                    for group in phase.groups
                ],
            }
            for phase in phases
        ]
    }


def make_run_dir(config: RunConfig) -> Path:
    """Makes the run directory.

    Raises:
        ConfigError: It cannot be made.
    """
    try:
        config.run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise config.mistake(("runs_dir",), f"{config.run_dir} cannot be made: {error.strerror}") from error
    return config.run_dir
