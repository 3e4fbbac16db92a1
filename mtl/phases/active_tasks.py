"""Which tasks' losses train anything in a phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from mtl.config import RunConfig
from mtl.config.phase import PhaseConfig, patterns_of
from mtl.patterns import PatternError, partition, select
from mtl.patterns.module_tree import describe


def active_tasks(config: RunConfig, phase: PhaseConfig) -> tuple[str, ...]:
    """The tasks that a phase names, or all, in the order of the configuration."""
    return tuple(task for task in config.tasks if phase.tasks is None or task in phase.tasks)


def live_tasks(
    config: RunConfig, phase: PhaseConfig, root: nn.Module, reached: Mapping[str, frozenset[str]]
) -> tuple[str, ...]:
    """The active tasks without those whose loss would reach frozen parameters only.

    Args:
        config: The run.
        phase: A phase of it; what is wrong with it is not told here, all its tasks are live then.
        root: The model without the balancing methods.
        reached: Full names of the parameters that each task's loss depends on.
    """
    tasks = active_tasks(config, phase)
    if phase.evaluate_only:
        return tasks
    try:
        training = _training(config, phase, root)
    except PatternError:
        return tasks
    return tuple(task for task in tasks if reached[task] & training) or tasks


def _training(config: RunConfig, phase: PhaseConfig, root: nn.Module) -> set[str]:
    names = [name for name, _ in root.named_parameters(remove_duplicate=False)]
    fixed = {name for name, p in root.named_parameters(remove_duplicate=False) if not p.requires_grad}
    tree = describe(root)
    always = [*patterns_of(config.freeze_always), *(f"~{text}" for text in config.MODEL.NOT_TRAIN_IN_MULTI_TASK)]
    frozen: Sequence[str] = partition(always, names, [], tree).frozen if always else ()
    if phase.train is not None:
        training = set(select(patterns_of(phase.train), names, tree).names)
    else:
        training = set(partition(patterns_of(phase.freeze or []), names, [], tree).trainable)
    return training - set(frozen) - fixed
