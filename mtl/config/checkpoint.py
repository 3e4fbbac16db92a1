"""The `checkpoint` component of a configuration."""

from __future__ import annotations

from mtl.config.types import Count, NotNegative, Strict


class CheckpointConfig(Strict):
    """When the state of a run is saved, besides after every validation.

    Attributes:
        every_minutes: Minutes between two checkpoints inside an epoch; 0 for none.
        every_steps: Steps of the run between two checkpoints inside an epoch.
        keep_every_epochs: Every N-th epoch's checkpoint is kept permanently; of the others only the last ones and the
            best ones are kept.
    """

    every_minutes: NotNegative = 10.0
    every_steps: Count | None = None
    keep_every_epochs: Count | None = None
