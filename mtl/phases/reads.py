"""Which settings a phase reads: those that would change what it does if they had another value."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mtl.config import RunConfig
from mtl.config.optim import OptimConfig, PlateauConfig, StepConfig
from mtl.config.phase import UntilConfig, WrittenPhase
from mtl.config.yaml_source import KeyPath
from mtl.phases.groups import Groups

# Those of `optim` that a phase may set itself.
OF_OPTIM = ("optimizer", "lr", "layer_decay", "weight_decay", "lr_schedule")


@dataclass(frozen=True)
class Reads:
    """The settings that a phase reads.

    Attributes:
        keys: The key paths of the settings, of those that not every phase reads.
        never: Key paths of numbers of epochs and steps that the phase ends before.
        borrows_lr: Whether `optim.lr` is the rate of its balancing method's weights alone.
    """

    keys: frozenset[KeyPath]
    never: tuple[KeyPath, ...]
    borrows_lr: bool


def reads_of(
    config: RunConfig, written: WrittenPhase, tasks: Sequence[str], groups: Groups, num_steps: int, steps_per_epoch: int
) -> Reads:
    """Finds out which settings a phase reads.

    Args:
        config: The run.
        written: The phase.
        tasks: The tasks whose losses train something in it.
        groups: Its parameter groups.
        num_steps: Its length in steps, at most.
        steps_per_epoch: Steps in one pass over the training data.
    """
    phase = written.config
    keys: set[KeyPath] = {("tasks", task) for task in tasks}
    keys.add(("data", "batch_size") if phase.batch_size is None else (*written.path, "batch_size"))
    keys.add(("cache", "mode") if phase.cache is None else (*written.path, "cache"))
    mode = phase.cache or config.cache.mode
    # Whether or not they are kept, `views` views are taken in turn: a run without a cache ends with the same bits.
    keys |= {("cache", "views")} if config.data.has_views else set()
    if mode != "off":
        keys.add(("cache", "dtype"))
        keys |= {("cache", "ram_gb")} if mode in ("auto", "ram") else set()
        keys |= {("cache", "disk_gb"), ("cache", "dir")} if mode in ("auto", "disk") else set()
    never: list[KeyPath] = []
    if not phase.evaluate_only:
        keys |= set(_of_training(config, written, tasks, groups))
        for path, comes in _lengths(config, written, num_steps, steps_per_epoch):
            (keys.add if comes else never.append)(path)
    return Reads(frozenset(keys), tuple(never), groups.borrows_lr)


def _of_training(config: RunConfig, written: WrittenPhase, tasks: Sequence[str], groups: Groups) -> Iterator[KeyPath]:
    for key in OptimConfig.model_fields:
        if key not in OF_OPTIM:
            yield "optim", key
        elif key != "layer_decay" or groups.trains_trunk:
            yield config.path_of(written, key)
    for key, patterns in groups.used.items():
        yield from ((*config.path_of(written, key), pattern) for pattern in patterns)
    yield balance_path(written)
    yield from ((*balance_path(written), "weights", task) for task in tasks)
    if groups.trains_trunk:
        yield from (("trunk", "checkpointing"), ("audit", "gradients_every_steps"))
    if groups.borrows_lr:
        yield "optim", "lr"


def balance_path(written: WrittenPhase) -> KeyPath:
    """Where the balancing method of a phase was written."""
    return ("balance",) if written.config.balance is None else (*written.path, "balance")


def _lengths(
    config: RunConfig, written: WrittenPhase, num_steps: int, steps_per_epoch: int
) -> Iterator[tuple[KeyPath, bool]]:
    """Numbers of epochs and steps, and whether what they stand for can come in the phase."""
    schedule, path = config.optim_of(written.config).lr_schedule, config.path_of(written, "lr_schedule")
    # A rate that falls after the last step falls for nothing.
    if isinstance(schedule, StepConfig):
        yield (*path, "every_epochs"), schedule.every_epochs * steps_per_epoch < num_steps
    if isinstance(schedule, PlateauConfig):
        yield (*path, "patience"), (schedule.patience + 1) * steps_per_epoch < num_steps
    if written.config.until is not None:
        yield from _conditions(written.config.until, (*written.path, "until"), num_steps, num_steps // steps_per_epoch)


def _conditions(until: UntilConfig, path: KeyPath, num_steps: int, num_epochs: int) -> Iterator[tuple[KeyPath, bool]]:
    if until.plateau is not None:
        # The first epoch is the first best one.
        key = "plateau" if until.patience is None else "patience"
        yield (*path, key), (until.patience or 1) + 1 <= num_epochs
    if until.epochs is not None:
        yield (*path, "epochs"), until.epochs <= num_epochs
    if until.steps is not None:
        yield (*path, "steps"), until.steps <= num_steps
    for key, inner in (("any", until.any), ("all", until.all)):
        for index, each in enumerate(inner or []):
            yield from _conditions(each, (*path, key, index), num_steps, num_epochs)
