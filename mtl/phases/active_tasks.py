"""Which tasks' losses train something in a phase.

This is found out first, from trunk and heads alone: which balancing methods there are follows from it.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from mtl.config import RunConfig
from mtl.config.phase import PhaseConfig, patterns_of
from mtl.config.yaml_source import KeyPath
from mtl.freeze import untrainable_parameters
from mtl.patterns import PatternError, select
from mtl.patterns.module_tree import describe
from mtl.runtime.text import hint


def active_tasks(config: RunConfig, phase: PhaseConfig) -> tuple[str, ...]:
    """The tasks that a phase names, or all that have labels, in the order of the configuration."""
    labelled = [task for task, own in config.tasks.items() if not own.unlabelled]
    return tuple(task for task in labelled if phase.tasks is None or task in phase.tasks)


def classic_patterns(config: RunConfig) -> list[str]:
    """The classic list of substrings as patterns."""
    return [f"~{text}" for text in config.MODEL.NOT_TRAIN_IN_MULTI_TASK]


def tasks_of_phases(
    config: RunConfig, model: nn.Module, reached: Mapping[str, frozenset[str]]
) -> tuple[dict[KeyPath, tuple[str, ...]], list[str]]:
    """The tasks of each written phase by its key path, and what is wrong with phases that are left out.

    Args: as for `resolve_tasks`.
    """
    mistakes: list[str] = []
    tasks_of: dict[KeyPath, tuple[str, ...]] = {}
    for written in config.written_phases:
        if written.path in tasks_of:
            continue
        labelled = [task for task, own in config.tasks.items() if not own.unlabelled]
        unknown = [task for task in written.config.tasks or [] if task not in labelled]
        for task in unknown:
            path = (*written.path, "tasks", (written.config.tasks or []).index(task))
            there = f"there are: {', '.join(labelled)}{hint(task, labelled)}"
            what = f"{task} is unlabelled" if task in config.tasks else f"no task {task!r}"
            mistakes += config.mistake(path, f"{what}; {there}").mistakes
        if not unknown:
            tasks_of[written.path] = resolve_tasks(config, written.config, model, reached)
    return tasks_of, list(dict.fromkeys(mistakes))


def resolve_tasks(
    config: RunConfig, phase: PhaseConfig, model: nn.Module, reached: Mapping[str, frozenset[str]]
) -> tuple[str, ...]:
    """Resolves the tasks: the active ones without those whose loss would reach frozen parameters only.

    All are kept if that would be none, or if a pattern does not match as it should among the parameters of trunk and
    heads: it may be one of `balance`, or of buffers; and if it is wrong, the freeze is refused when it is resolved.

    Args:
        config: The run.
        phase: A phase of it.
        model: Trunk and heads.
        reached: Full names of the parameters that each task's loss depends on.
    """
    tasks = active_tasks(config, phase)
    if phase.evaluate_only:
        return tasks
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    tree = describe(model)
    try:
        own = set(select(patterns_of(phase.train or phase.freeze or []), names, tree).names)
        always = select([*patterns_of(config.freeze_always), *classic_patterns(config)], names, tree).names
    except PatternError:
        return tasks
    # `train` lists what is trained, `freeze` what is not.
    trainable = {name for name in names if (name in own) == (phase.train is not None)}
    trainable -= {*always, *untrainable_parameters(model)}
    return tuple(task for task in tasks if not reached[task].isdisjoint(trainable)) or tasks
