"""The `checkpoint` component of a configuration."""

from __future__ import annotations

from mtl.config.types import Count, NotNegative, Strict


class CheckpointConfig(Strict):
    """When checkpoints are written inside an epoch; one is written after every validation in any case.

    Attributes:
        every_minutes: Minutes from one checkpoint to the next inside an epoch; 0 for never.
        every_steps: Steps of the run from one checkpoint to the next inside an epoch; if not set, steps do not matter.
        keep_every_epochs: The checkpoint after every this many epochs is kept permanently; of the others only the two
            newest and the best. If not set, none is kept permanently.
    """

    every_minutes: NotNegative = 10.0
    every_steps: Count | None = None
    keep_every_epochs: Count | None = None
