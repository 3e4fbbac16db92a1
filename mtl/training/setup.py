"""From a configuration to the parts of a run, with everything checked and nothing written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mtl.config import RunConfig, SettingError, mistake_of
from mtl.config.distributed import DistributedConfig
from mtl.config.precedence import Precedence, is_written, precedence_of
from mtl.data import Batch, Loading, Split, SplitWorkers, TaughtSplit, Teaching, check_rooms
from mtl.distributed.world import ALONE, World, WorldError
from mtl.freeze import free_norm_statistics
from mtl.model import set_output_bias
from mtl.model.init_from import NOTHING, InitialWeights, Taken, read_initial_weights
from mtl.model.teachers import load_teachers
from mtl.optim.optimizers import try_out
from mtl.phases.data_source import open_source
from mtl.phases.plan import Plan, make_plan
from mtl.phases.setup import ModelSetup, build_meta_setup, build_model_setup, without_weights
from mtl.runtime.console import logger
from mtl.runtime.memory import keep_freed_memory
from mtl.tasks import labels_of
from mtl.training.autotune import choose, lay_out
from mtl.training.depthwise_trial import choose_depthwise, set_depthwise
from mtl.training.validation import Scores, validate_constant


@dataclass(frozen=True)
class RunSetup(ModelSetup):
    """The parts of a run.

    Attributes:
        device: Where the run computes.
        train: Training data.
        val: Validation data.
        workers: The processes that read both.
        constants: The output of the trivial predictor for each task, "c".
        trivial: Metrics of the trivial predictor, which gives these constants.
        plan: What every phase freezes, trains and costs.
        taken: Where the weights come from that `init_from` gave; empty for a run that resumes.
    """

    device: torch.device
    train: Split
    val: Split
    workers: SplitWorkers
    constants: Mapping[str, Tensor]
    trivial: Scores
    plan: Plan
    taken: tuple[Taken, ...] = ()


def assemble(
    config: RunConfig,
    quiet: bool = False,
    world: World = ALONE,
    begins: bool = True,
    teachers_from: Path | None = None,
) -> RunSetup:
    """Makes the parts of a run. Generated data may be put in the data cache; nothing else is written.

    Args:
        config: The run.
        quiet: Whether to show no progress bar while data is made.
        world: The processes that train together, which have not met yet.
        begins: Whether initial weights are needed, of `trunk.weights` and `init_from`; a checkpoint has them all, and
            those files may be gone when a run is resumed.
        teachers_from: The checkpoint of the same run from which teachers are loaded, in place of their own files.

    Raises:
        ConfigError: Anything in the configuration that turns out not to work, with the place where it was written.
        DataError: The data cannot be had.
        CheckpointError: That checkpoint has no such teachers.
    """
    excluded = _check_fsdp(config, world)
    keep_freed_memory()
    device = device_of(config, world)
    try:
        check_rooms(config.data)
    except SettingError as error:
        raise mistake_of(config, error) from error
    world.start(device, config.distributed.timeout_s)
    # Without weights first: what is wrong with the configuration is found before any are loaded.
    source = open_source(config)
    meta = build_meta_setup(config, source=source)
    plan = make_plan(meta)
    initial = _initial_weights(meta) if begins else NOTHING
    with_teachers = teachers_from is None
    built = config if begins and not initial.has_trunk else without_weights(config)
    model_setup = build_model_setup(built, source=source, with_teachers=with_teachers)
    tasks = model_setup.tasks
    try:
        # Data that has to be made is made once.
        with world.main_first():
            label_of = labels_of(config)
            train, val = source.load({name: tasks[name] for name in label_of}, label_of, quiet)
    except SettingError as error:
        raise mistake_of(config, error) from error
    if train.num_skipped:
        # An epoch has fewer steps than were planned.
        plan = make_plan(build_meta_setup(config, train, source))
        model_setup = build_model_setup(built, train=train, source=source, with_teachers=with_teachers)
        tasks = model_setup.tasks
    # What the run records is what was written, whatever was loaded.
    model_setup = replace(model_setup, config=config)
    if model_setup.teachers:
        if teachers_from is not None:
            load_teachers(model_setup.teachers, teachers_from)
        train, val = _taught(model_setup, train, val, device, world, quiet)
    constants = _fit_constants(model_setup, train)
    # After the biases, which are those of new heads only.
    initial.load_into(model_setup.root)
    trivial = validate_constant(model_setup.labelled, constants, val, config.data.batch_size)
    _try_out_optimizers(model_setup, device)
    model_setup.root.to(device)
    _check_processes(model_setup, world)
    if world.is_alone:
        _warn_of_distributed(config)
    batch = train.batch(torch.arange(min(config.data.batch_size, len(train)))).to(device)
    model_setup = replace(model_setup, config=_choose_kernels(model_setup, batch, device, world, excluded))
    return RunSetup(
        **vars(model_setup),
        device=device,
        train=train,
        val=val,
        workers=SplitWorkers(config.data.num_workers, [train, val]),
        constants=constants,
        trivial=trivial,
        plan=plan,
        taken=initial.taken,
    )


def _fit_constants(model_setup: ModelSetup, train: Split) -> dict[str, Tensor]:
    """The trivial predictor's output for each task, with which the biases of the heads begin."""
    constants = {name: task.fit(train.labels_to_fit(name)) for name, task in model_setup.labelled.items()}
    for name, constant in constants.items():
        try:
            set_output_bias(model_setup.model.heads[name], constant)
        except ValueError as error:
            raise model_setup.config.mistake(("tasks", name, "head"), str(error)) from error
    return constants


def _choose_kernels(
    model_setup: ModelSetup, batch: Batch, device: torch.device, world: World, excluded: tuple[str, ...]
) -> RunConfig:
    """The configuration with `auto` replaced by what is fastest on this batch, which the model is set to."""
    choice = choose(model_setup, batch, device, excluded)
    if choice.why:
        logger.info(choice.why)
    # Another rank may find something else to be fastest.
    layout, precision = world.broadcast([choice.memory_format, choice.precision])
    lay_out(model_setup, layout)
    config = model_setup.config.with_changes(memory_format=layout, precision=precision)
    config = config.with_changes(depthwise=world.broadcast(choose_depthwise(model_setup, config, batch)))
    set_depthwise(model_setup, config, device)
    return config


def _initial_weights(meta: ModelSetup) -> InitialWeights:
    """The tensors that `init_from` gives to a model like this one, read and checked."""
    config, classes = meta.config, {name: task.class_names for name, task in meta.tasks.items()}
    try:
        initial = read_initial_weights(config, meta.root, classes)
    except SettingError as error:
        raise mistake_of(config, error) from error
    for item in initial.taken:
        logger.info(f"init_from: {item}")
    for note in initial.notes:
        logger.warning(f"init_from: {note}")
    if initial.has_trunk and config.trunk.weights != "none":
        logger.info(f"trunk.weights: {config.trunk.weights}: not loaded, since init_from gives the whole trunk")
    return initial


def _taught(
    model_setup: ModelSetup, train: Split, val: Split, device: torch.device, world: World, quiet: bool
) -> tuple[Split, Split]:
    """Both splits with the embeddings of teachers, computed once of all images that are the same in every epoch."""
    data = model_setup.config.data
    given = {
        name: Teaching(teacher.to(device), teacher.width, teacher.digest())
        for name, teacher in model_setup.teachers.items()
    }
    loading = Loading(device=device, workers=SplitWorkers(data.num_workers))
    splits = [TaughtSplit(split, given, data.batch_size, loading) for split in (train, val)]
    for split in splits[1:] if data.has_views else splits:
        split.keep(world, quiet)
    return splits[0], splits[1]


def _try_out_optimizers(model_setup: ModelSetup, device: torch.device) -> None:
    config, tried = model_setup.config, set[str]()
    for phase, written in zip(model_setup.phases, config.written_phases, strict=True):
        optimizer = phase.optim.optimizer
        if phase.config.evaluate_only or optimizer.model_dump_json() in tried:
            continue
        tried.add(optimizer.model_dump_json())
        try:
            try_out(optimizer, device)
        except SettingError as error:
            raise mistake_of(config, error, config.path_of(written, "optimizer")[:-1]) from error


def _check_processes(model_setup: ModelSetup, world: World) -> None:
    """Raises `ConfigError` if the run cannot be divided among this many processes."""
    config = model_setup.config
    if world.is_alone:
        return
    if config.distributed.sync_batchnorm and config.compile:
        raise config.mistake(("compile",), "with distributed.sync_batchnorm=true code is not compiled; expected false")
    for phase, written in zip(model_setup.phases, config.written_phases, strict=True):
        own = written.config.batch_size is not None
        place = (*written.path, "batch_size") if own else ("data", "batch_size")
        trains_norms = (
            bool(free_norm_statistics(model_setup.root, phase.freeze.plan)) and not phase.config.evaluate_only
        )
        least = world.size * (2 if trains_norms and not config.distributed.sync_batchnorm else 1)
        if phase.batch_size < least:
            why = ", two each, since BatchNorm cannot train on one" if trains_norms else ""
            raise config.mistake(
                place,
                f"expected batches of {least} images or more for {world.size} processes{why}, got {phase.batch_size}",
            )
        method = phase.balance.by_gradients
        if config.distributed.strategy == "fsdp2" and method is not None and method.needs_whole_rows:
            key = (*(written.path if written.config.balance else ()), "balance", "method")
            why = "no process has the whole gradients, which weights(losses, rows) is given"
            expected = "a Weighting of torchjd.aggregation, which is given their products"
            raise config.mistake(key, f"with distributed.strategy=fsdp2 {why}; expected {expected}, got {method.name}")
        if phase.balance.per_sample and not phase.config.evaluate_only:
            key = (*(written.path if written.config.balance else ()), "balance", "per_sample")
            why = "each process has features of other images"
            raise config.mistake(key, f"{why}; expected false with several processes, got true")
        if phase.freeze.unreached and config.unreached != "freeze":
            raise config.mistake(
                ("unreached",), "several processes wait for the gradients of all that trains; expected freeze"
            )


def _warn_of_distributed(config: RunConfig) -> None:
    """Says what was asked for on the command line and needs several processes; a file may be for both."""
    for key in DistributedConfig.model_fields:
        path = ("distributed", key)
        if is_written(config.source, path) and precedence_of(config.source, path) == Precedence.COMMAND_LINE:
            logger.warning(f"command line: distributed.{key}: this process trains alone, and does not read it")


def _check_fsdp(config: RunConfig, world: World) -> tuple[str, ...]:
    """Layouts and precisions that `auto` must not take where the model is sharded (fsdp2); none if it is not.

    Raises:
        ConfigError: The configuration asks for something that FSDP does not go with here.
    """
    if world.is_alone or config.distributed.strategy != "fsdp2":
        return ()
    for key, got, expected, why in (
        ("memory_format", config.memory_format, "contiguous", "it shards contiguous tensors only"),
        ("precision", config.precision, "fp32 or bf16", "losses are not scaled for sharded gradients"),
        ("compile", config.compile, "false", "compiled code does not gather shards"),
        ("join_heads", config.join_heads, "false", "each head is gathered by itself"),
    ):
        if got in ("channels_last", "fp16", True):
            raise config.mistake((key,), f"with distributed.strategy=fsdp2 {why}; expected {expected}, got {got}")
    return ("channels_last", "fp16")


def device_of(config: RunConfig, world: World = ALONE) -> torch.device:
    """Where a run computes; `ConfigError` if that device is not there."""
    if not world.is_alone and config.device.startswith("cuda:"):
        raise config.mistake(("device",), f"each process has a GPU of its own; expected cuda, got {config.device}")
    if not world.is_alone and config.device != "cpu" and torch.cuda.is_available():
        try:
            return world.gpu()
        except WorldError as error:
            raise config.mistake(("device",), str(error)) from error
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(config.device)
    there = {"cpu": True, "cuda": torch.cuda.is_available()}[device.type]
    if not there or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        raise config.mistake(("device",), f"there is no device {config.device!r} here; use auto or cpu")
    return device
