"""How often a frozen trunk is needed, and whether a phase may keep what it computes."""

from __future__ import annotations

from collections.abc import Sequence

from mtl.config import RunConfig
from mtl.phases.resolve import Phase

# What steps in a row read at once: about what a processor's caches hold, in bytes. Of larger batches the steps take so
# long that what happens in between does not count.
_MOST_BYTES = 1 << 22
# Fewer steps in a row are not worth it.
FEWEST_IN_A_ROW = 2


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


def num_views(config: RunConfig) -> int:
    """How many views of each training image are kept."""
    return config.cache.views or 1 if config.data.has_views else 1


def why_not_kept(config: RunConfig, phase: Phase, passes: float) -> str:
    """Why a phase keeps nothing of the trunk, as far as the configuration says; empty if it may.

    Args:
        config: The run.
        phase: A phase of it.
        passes: How often what is kept would be needed.
    """
    mode = phase.config.cache or config.cache.mode
    if mode == "off":
        return "cache is off"
    if config.data.has_views and config.cache.views is None:
        return "every epoch changes the images in another way; cache.views would keep some views of each"
    if phase.config.evaluate_only and config.optim.ema_decay is not None:
        return "an evaluation judges averages, of which there are no fingerprints"
    if mode == "auto" and passes <= 1:
        return "the frozen part is needed for no more than one pass over the data"
    return ""


def most_in_a_row(config: RunConfig, phase: Phase, bytes_per_image: int) -> int:
    """How many steps of heads on kept features may be taken in a row, with nothing in between; 0 if it does not pay.

    Args:
        config: The run, its precision chosen; one process trains.
        phase: A phase of it in which the whole trunk is kept.
        bytes_per_image: What is kept of an image.
    """
    most = _MOST_BYTES // max(1, phase.batch_size * bytes_per_image)
    if (every := config.checkpoint.every_steps) is not None:
        most = min(most, every - 1)
    return most if most >= FEWEST_IN_A_ROW and _is_independent(config, phase) else 0


def _is_independent(config: RunConfig, phase: Phase) -> bool:
    """Whether steps of heads depend on nothing that happens between two of them."""
    follows = phase.balances_gradients or phase.balance.follows_steps or phase.balance.may_draw
    return (
        phase.optim.accumulate == 1
        and config.precision != "fp16"
        and config.not_finite == "raise"
        and config.optim.ema_decay is None
        and not follows
    )


def _frozen_in_trunk(phase: Phase) -> set[str]:
    return {name for name in phase.freeze.plan.names.frozen if name.startswith("trunk.")}
