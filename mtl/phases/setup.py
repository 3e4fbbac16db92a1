"""From a configuration to the model of a run and its resolved phases, with no data and nothing written."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from mtl.config import ConfigError, DataConfig, DistillConfig, RunConfig, SettingError, mistake_of
from mtl.config.mixed import MixedData
from mtl.config.transform import RotationConfig
from mtl.config.yaml_source import KeyPath
from mtl.data import Source, Split, check_image
from mtl.freeze import untrainable_parameters
from mtl.model import MultiTaskModel, build_trunk
from mtl.model.build import input_channels
from mtl.model.depthwise import depthwise_layers
from mtl.model.heads.joined import joinable
from mtl.model.network import MEMORY_FORMATS
from mtl.model.reachability import reached_parameters
from mtl.model.shapes import quick_shapes
from mtl.model.teachers import TEACHERS, Teacher, build_teachers
from mtl.optim.balance.build import build_balance
from mtl.phases.active_tasks import tasks_of_phases
from mtl.phases.data_source import open_source
from mtl.phases.freeze_rules import ResolveContext
from mtl.phases.metrics import RunMetrics
from mtl.phases.resolve import Phase, resolve_phases
from mtl.phases.unread import unread_settings
from mtl.runtime.text import count
from mtl.tasks import Task, build_tasks, labels_of

_Made = TypeVar("_Made")


@dataclass(frozen=True)
class ModelSetup:
    """The model of a run and its phases, without data.

    Attributes:
        config: The configuration they were made from.
        source: The data set.
        tasks: The tasks by name.
        model: Trunk and heads.
        teachers: The teachers of tasks that have one, by task; they are in `root`, and no part of the model.
        root: One module around all that has parameters, under the names that users write: trunk, heads, balance,
            teachers.
        fixed: Patterns of what the model itself keeps from training, and of the teachers.
        phases: The phases, resolved.
        unread: Settings of the configuration's files that no phase reads, each in a line with its place.
    """

    config: RunConfig
    source: Source
    tasks: dict[str, Task]
    model: MultiTaskModel
    teachers: Mapping[str, Teacher]
    root: nn.Module
    fixed: list[str]
    phases: list[Phase]
    unread: list[str]

    @property
    def labelled(self) -> dict[str, Task]:
        """The tasks of which images have labels: those that can be trained and measured."""
        return {name: task for name, task in self.tasks.items() if not self.config.tasks[name].unlabelled}


def build_model_setup(
    config: RunConfig,
    device: str = "cpu",
    train: Split | None = None,
    source: Source | None = None,
    with_teachers: bool = False,
) -> ModelSetup:
    """Makes the model of a run and resolves its phases.

    The model's initial weights follow from the run's seed; on the meta device it has none, and costs nothing.

    Args:
        config: The run.
        device: `cpu` or `meta`.
        train: The training images, where their number differs from the data set's.
        source: The data set, if it is open already.
        with_teachers: Whether teachers get their weights, without which they are an architecture.

    Raises:
        ConfigError: Anything in the configuration that turns out not to work, with the place where it was written.
        DataError: Something of the data set cannot be read.
    """
    source = open_source(config) if source is None else source
    if device != "meta":
        try:
            check_image(config.data.size)
        except SettingError as error:
            raise mistake_of(config, error) from error
    _seed_everything(config.seed)
    teachers, tasks = _build_tasks(config, source, device, with_teachers)
    _check_fill(config, tasks)
    own_config = without_weights(config) if device == "meta" else config
    # Read before the device is set: the source may have to open images, which are on the CPU.
    channels = source.channels
    try:
        with torch.device(device):
            model = build_model(own_config, tasks, channels)
            _check_join_heads(config, model)
            reached = reached_parameters(model)
            tasks_of, mistakes = tasks_of_phases(config, model, reached)
            balances, balance_of = _build_balances(config, tasks_of, mistakes)
    except SettingError as error:
        raise mistake_of(config, error) from error
    own = {**dict(model.named_children()), "balance": balances}
    root = nn.ModuleDict({**own, TEACHERS: nn.ModuleDict(teachers)} if teachers else own)
    fixed = [*untrainable_parameters(nn.ModuleDict(own)), *([TEACHERS] if teachers else [])]
    context = ResolveContext(
        config=config,
        root=root,
        fixed=fixed,
        metrics=RunMetrics(config, {name: task for name, task in tasks.items() if not config.tasks[name].unlabelled}),
        balance_of=balance_of,
        tasks_of=tasks_of,
        reached=reached,
        order_of=source.order if train is None else train.order,
    )
    phases = resolve_phases(context, mistakes)
    unread_mistakes, unread = unread_settings(config, phases, depthwise_layers(root))
    if unread_mistakes:
        raise ConfigError(unread_mistakes)
    return ModelSetup(config, source, tasks, model, teachers, root, fixed, phases, unread)


def build_model(config: RunConfig, tasks: Mapping[str, Task], channels: int) -> MultiTaskModel:
    """The model alone.

    Args:
        config: The run.
        tasks: Its tasks.
        channels: Channels of the images.

    Raises:
        ConfigError: The trunk takes other images.
        SettingError: Anything else that turns out not to work.
    """
    # `auto` starts in the contiguous layout; the trial on the first batch may choose another one.
    layout = MEMORY_FORMATS["contiguous" if config.memory_format == "auto" else config.memory_format]
    trunk = config.trunk
    if channels > 3:
        trunk = trunk.model_copy(update={"options": {"in_chans": channels} | trunk.options})
    takes = input_channels(trunk)
    # Grey images are shown to each of three channels.
    if channels != takes and (channels, takes) != (1, 3):
        message = f"the trunk takes images of {count(takes, 'channel')}, and those of {config.data.name} have"
        raise config.mistake(("trunk", "options"), f"{message} {channels}")
    heads = {name: own.head for name, own in config.tasks.items()}
    return MultiTaskModel(trunk, tasks, config.data.size, layout, heads)


def _check_join_heads(config: RunConfig, model: MultiTaskModel) -> None:
    if config.join_heads and len(joined := joinable(dict(model.heads.items()))) < 2:
        there = f"only that of {joined[0]!r} is one" if joined else "there is none"
        raise config.mistake(("join_heads",), f"expected at least two `linear` heads, which are joined; {there}")


def build_meta_setup(config: RunConfig, train: Split | None = None, source: Source | None = None) -> ModelSetup:
    """As `build_model_setup`, on the meta device, or on the CPU for a trunk that cannot be built there.

    Raises:
        ConfigError, DataError: As `build_model_setup`.
    """
    without = without_weights(config)
    opened = open_source(config) if source is None else source
    with quick_shapes():
        setup = _on_meta_or_cpu(lambda device: build_model_setup(without, device, train, opened))
    return replace(setup, config=config)


def build_meta_tasks(config: RunConfig, source: Source) -> dict[str, Task]:
    """The tasks alone.

    Raises:
        ConfigError: One of them cannot be made.
    """
    return _on_meta_or_cpu(lambda device: _build_tasks(config, source, device, with_teachers=False)[1])


def _build_tasks(
    config: RunConfig, source: Source, device: str, with_teachers: bool
) -> tuple[dict[str, Teacher], dict[str, Task]]:
    """The teachers, and the tasks, which learn embeddings of their width."""
    label_of = labels_of(config)
    known = {name: getattr(own, "class_names", None) or () for name, own in config.tasks.items()}
    names = known | source.class_names(label_of)
    if not any(isinstance(own, DistillConfig) for own in config.tasks.values()):
        return {}, build_tasks(config, names)
    # Read before the device is set: the source may have to open images, which are on the CPU.
    channels = source.channels
    try:
        with torch.device(device):
            teachers = build_teachers(config, channels, with_teachers)
    except SettingError as error:
        raise mistake_of(config, error) from error
    widths = {name: teacher.width for name, teacher in teachers.items()}
    return teachers, build_tasks(config, names, widths)


def build_meta_trunk(config: RunConfig) -> nn.Module:
    """The trunk alone, as an architecture.

    Raises:
        ConfigError: timm knows no such model, or cannot build it.
    """

    def build(device: str) -> nn.Module:
        try:
            with torch.device(device):
                return build_trunk(without_weights(config).trunk, config.data.size)
        except SettingError as error:
            raise mistake_of(config, error) from error

    return _on_meta_or_cpu(build)


def _on_meta_or_cpu(make: Callable[[str], _Made]) -> _Made:
    try:
        return make("meta")
    except ConfigError:
        # Either the configuration is wrong, which then shows again, or this trunk has to compute while it is built.
        return make("cpu")


def without_weights(config: RunConfig) -> RunConfig:
    """The configuration with a trunk that begins with random weights."""
    return config.with_changes(trunk=config.trunk.model_copy(update={"weights": "none"}))


def _build_balances(
    config: RunConfig, tasks_of: Mapping[KeyPath, tuple[str, ...]], mistakes: list[str]
) -> tuple[nn.ModuleList, dict[KeyPath, int]]:
    """The balancing methods of a run, one for each method and set of tasks, and which phase uses which.

    Args:
        config: The run.
        tasks_of: The tasks of the phases that are not left out.
        mistakes: What is wrong with others is added here.

    Returns:
        The methods, and their places by the phases' key paths.
    """
    balances, keys = nn.ModuleList(), list[tuple[str, tuple[str, ...]]]()
    balance_of: dict[KeyPath, int] = {}
    for written in config.written_phases:
        if written.path in balance_of or written.path not in tasks_of:
            continue
        own, tasks = written.config.balance, tasks_of[written.path]
        settings, place = (config.balance, ()) if own is None else (own, written.path)
        key = (settings.model_dump_json(), tasks)
        if key not in keys:
            try:
                balances.append(build_balance(settings, tasks, list(config.tasks)))
            except SettingError as error:
                mistakes += mistake_of(config, error, place).mistakes
                continue
            keys.append(key)
        balance_of[written.path] = keys.index(key)
    return balances, balance_of


def _check_fill(config: RunConfig, tasks: Mapping[str, Task]) -> None:
    """Raises `ConfigError` if a rotation fills masks with a class that a task learns."""
    data, found = config.data, dict[KeyPath, RotationConfig]()
    places: dict[KeyPath, DataConfig] = {("data",): data}
    if isinstance(data, MixedData):
        places |= {("data", "sets", name): own for name, own in data.sets.items()}
    for place, own in places.items():
        for split in ("train", "val"):
            for number, each in enumerate(getattr(own.transform, split)):
                if isinstance(each, RotationConfig):
                    found[*place, "transform", split, number] = each
    for path, rotation in found.items():
        for name, task in tasks.items():
            ignored = getattr(task, "ignore_index", None)
            if task.label_kind == "mask" and ignored != rotation.options.ignore:
                message = f"expected the ignore_index of the task {name!r}, {ignored}, got {rotation.options.ignore}"
                raise config.mistake((*path, "options", "ignore"), message)


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
