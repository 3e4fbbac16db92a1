"""How often a frozen trunk is needed."""

from __future__ import annotations

from collections.abc import Sequence

from mtl.phases.resolve import Phase


def num_passes(phases: Sequence[Phase], steps_done: int) -> float:
    """Passes over the training data that the first of some phases, and those after it, make with one frozen trunk.

    Args:
        phases: A phase and all later ones.
        steps_done: Steps that the first one has taken already.
    """
    passes = -steps_done / phases[0].steps_per_epoch
    frozen = _frozen_in_trunk(phases[0])
    for phase in phases:
        if _frozen_in_trunk(phase) != frozen:
            break
        passes += 0 if phase.config.evaluate_only else phase.num_steps / phase.steps_per_epoch
    return passes


def _frozen_in_trunk(phase: Phase) -> set[str]:
    return {name for name in phase.freeze.plan.names.frozen if name.startswith("trunk.")}
