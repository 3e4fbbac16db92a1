"""Parameters that cannot train in a phase of a run, found from its initial weights."""

from __future__ import annotations

from mtl.model.dead_branch import DeadBranch, find_dead_branch
from mtl.phases.setup import ModelSetup


def dead_branches(model_setup: ModelSetup) -> dict[str, DeadBranch]:
    """Finds the parameters of each phase that cannot train, since a frozen tensor of zeros stands in their way.

    Args:
        model_setup: A model with the weights that its first phase begins with, and its phases.

    Returns:
        What was found, by the names of the phases; those in which nothing is dead are left out.
    """
    found: dict[str, DeadBranch] = {}
    looked: dict[tuple[object, ...], DeadBranch | None] = {}
    moved: frozenset[str] = frozenset()
    for phase in model_setup.phases:
        if phase.config.evaluate_only:
            continue
        trainable = frozenset(phase.freeze.plan.names.trainable)
        key = trainable, phase.tasks, moved
        if key not in looked:
            looked[key] = find_dead_branch(model_setup.model, phase.tasks, trainable, moved)
        if (branch := looked[key]) is not None:
            found[phase.name] = branch
        moved |= trainable
    return found
