"""From the phases that a user wrote to phases resolved against a model: what each freezes, trains, and with what."""

from mtl.phases.freeze import Surroundings
from mtl.phases.length import SCORE, Metrics
from mtl.phases.live import active_tasks, live_tasks
from mtl.phases.passes import num_passes, num_views, why_not_kept
from mtl.phases.resolve import Phase, resolve_phases

__all__ = [
    "SCORE",
    "Metrics",
    "Phase",
    "Surroundings",
    "active_tasks",
    "live_tasks",
    "num_passes",
    "num_views",
    "resolve_phases",
    "why_not_kept",
]
