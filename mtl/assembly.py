"""From a configuration to the parts of a run, with everything checked and nothing written."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from mtl.balance import Balance, build_balance
from mtl.config import PhaseConfig, RunConfig, SettingError, mistake_of
from mtl.data import BUILT_IN, Split, load_data, num_batches
from mtl.freeze import FreezeError, FreezePlan, fixed_parameters, plan_freeze, trainable_parameters
from mtl.model import MultiTaskModel, start_from
from mtl.moduletree import describe
from mtl.nearest import hint
from mtl.optim import LearningRateError, group_parameters, rates
from mtl.patterns import PatternError, PatternLike
from mtl.tasks import Task, build_tasks
from mtl.validation import Scores, validate_constant
from mtl.yaml_source import KeyPath


@dataclass(frozen=True)
class Phase:
    """A phase with its patterns resolved.

    Attributes:
        config: What the user wrote.
        freeze: All patterns that hold: the phase's own, the classic list, and what the model itself keeps fixed.
        plan: What they freeze.
        groups: What the run's optimizer trains, in groups with peak learning rate and weight decay.
    """

    config: PhaseConfig
    freeze: list[PatternLike]
    plan: FreezePlan
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
        trivial: Metrics of the trivial predictor, which gives one constant output per task.
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
    trivial: Scores

    @property
    def steps_per_epoch(self) -> int:
        return -(-num_batches(self.train, self.config.data.batch_size) // self.config.optim.accumulate)

    def num_steps(self, phase: Phase) -> int:
        """A phase's length in optimizer steps."""
        return phase.config.steps or (phase.config.epochs or 0) * self.steps_per_epoch


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
    layout = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}[config.memory_format]
    try:
        model = MultiTaskModel(config.trunk, tasks, config.data.image_size, layout)
        balance = build_balance(config.balance, list(tasks))
        root = nn.ModuleDict({**dict(model.named_children()), "balance": balance})
        fixed = fixed_parameters(root)
        phases = [_resolve(config, index, root, balance, fixed) for index in range(len(config.phases))]
        train, val = load_data(config.data, tasks, quiet)
    except SettingError as error:
        raise mistake_of(config, error) from error
    constants = {name: task.fit(train.labels[name]) for name, task in tasks.items()}
    for name, constant in constants.items():
        start_from(model.heads[name], constant)
    trivial = validate_constant(tasks, constants, val, config.data.batch_size)
    if min(config.data.batch_size, len(train)) == 1 and any(isinstance(m, _NormBase) for m in root.modules()):
        raise config.mistake(
            ("data", "batch_size"), "expected batches of two images or more: BatchNorm cannot train on one"
        )
    root.to(device)
    return Parts(config, device, tasks, model, balance, root, phases, train, val, trivial)


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
        there = f"there are: {', '.join(BUILT_IN)}{hint(config.data.name, BUILT_IN)}"
        raise config.mistake(("data", "name"), f"no data set {config.data.name!r}; {there}")
    for task in config.tasks:
        if task not in data.labels:
            there = f"it has: {', '.join(data.labels)}{hint(task, data.labels)}"
            raise config.mistake(("tasks", task), f"{config.data.name} has no labels of that name; {there}")


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _resolve(config: RunConfig, index: int, root: nn.Module, balance: Balance, fixed: list[str]) -> Phase:
    phase = config.phases[index]
    here: KeyPath = ("phases", index)
    freeze = [*config.freeze_patterns(phase), *fixed]
    try:
        plan = plan_freeze(root, freeze)
    except PatternError as error:
        behind = error.index - len(phase.freeze)
        classic: KeyPath = ("MODEL", "NOT_TRAIN_IN_MULTI_TASK", behind)
        raise config.mistake((*here, "freeze", error.index) if behind < 0 else classic, str(error)) from error
    except FreezeError as error:
        raise config.mistake((*here, "freeze"), str(error)) from error
    steps_itself = {id(parameter) for group in balance.param_groups for parameter in group["params"]}
    if steps_itself and any(name.startswith("balance.") for name in plan.names.frozen):
        message = f"balance cannot be frozen: the method {config.balance.method!r} steps its own weights"
        raise config.mistake((*here, "freeze"), message)
    if all(name.startswith("balance.") for name in plan.names.trainable):
        raise config.mistake((*here, "freeze"), f"phase {phase.name!r} trains nothing: every parameter is frozen")
    parameters = {n: p for n, p in trainable_parameters(root, plan).items() if id(p) not in steps_itself}
    lr = config.optim.lr if phase.lr is None else phase.lr
    if isinstance(lr, dict) and not list(balance.parameters()):
        # A rate for the balancing method's weights may stay when the method is changed for one that has none.
        lr = {pattern: rate for pattern, rate in lr.items() if pattern.split(".")[0] != "balance"}
    every_name = [*plan.names.frozen, *plan.names.trainable]
    try:
        lr_of = rates(lr, list(parameters), every_name, config.optim.lr, describe(root))
    except (PatternError, LearningRateError) as error:
        key = [list(lr)[error.index]] if isinstance(error, PatternError) and isinstance(lr, dict) else []
        raise config.mistake((*here, "lr", *key), str(error)) from error
    return Phase(phase, freeze, plan, group_parameters(config.optim, parameters, lr_of))


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
