"""Which tasks' losses train something in a phase.

This is found out first, from trunk and heads alone: which balancing methods there are follows from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from mtl.config import RunConfig
from mtl.config.phase import PhaseConfig, patterns_of
from mtl.freeze import untrainable_parameters
from mtl.patterns import Counted, ModuleTree, PatternError, PatternLike, select, text_of
from mtl.patterns.module_tree import describe


@dataclass(frozen=True)
class PhaseTasks:
    """The tasks of a phase.

    Attributes:
        tasks: Those whose losses are computed.
        unreached: Parameters of trunk and heads that nothing in the configuration freezes, but that none of these
            losses depends on.
    """

    tasks: tuple[str, ...]
    unreached: tuple[str, ...]


def active_tasks(config: RunConfig, phase: PhaseConfig) -> tuple[str, ...]:
    """The tasks that a phase names, or all that have labels, in the order of the configuration."""
    labelled = [task for task, own in config.tasks.items() if not own.unlabelled]
    return tuple(task for task in labelled if phase.tasks is None or task in phase.tasks)


def classic_patterns(config: RunConfig) -> list[str]:
    """The classic list of substrings as patterns."""
    return [f"~{text}" for text in config.MODEL.NOT_TRAIN_IN_MULTI_TASK]


def resolve_tasks(
    config: RunConfig, phase: PhaseConfig, model: nn.Module, reached: Mapping[str, frozenset[str]]
) -> PhaseTasks:
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
        return PhaseTasks(tasks, ())
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    tree = describe(model)
    own, own_match = _select(patterns_of(phase.train or phase.freeze or []), names, tree)
    always, always_match = _select([*patterns_of(config.freeze_always), *classic_patterns(config)], names, tree)
    frozen = always.union(untrainable_parameters(model))
    # `train` lists what is trained, `freeze` what is not.
    trainable = [name for name in names if (name in own) == (phase.train is not None) and name not in frozen]
    if own_match and always_match:
        tasks = tuple(task for task in tasks if not reached[task].isdisjoint(trainable)) or tasks
    depended_on = frozenset[str]().union(*(reached[task] for task in tasks))
    return PhaseTasks(tasks, tuple(name for name in trainable if name not in depended_on))


def _select(patterns: Sequence[PatternLike], names: Sequence[str], tree: ModuleTree) -> tuple[set[str], bool]:
    """The names that patterns select among some of all names, and whether each pattern matches as it should."""
    patterns, all_match = list(patterns), True
    while True:
        try:
            return set(select(patterns, names, tree).names), all_match
        except PatternError as error:
            # One that matches nothing decides nothing; a number may count names that are not here.
            wrong = patterns[error.index]
            patterns[error.index : error.index + 1] = [text_of(wrong)] if isinstance(wrong, Counted) else []
            all_match = False
