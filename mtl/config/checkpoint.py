"""The configuration of what is kept of a run so that it can go on."""

from __future__ import annotations

from mtl.config.types import Count, NotNegative, Strict


class CheckpointConfig(Strict):
    """When the whole state of a run is written, besides after every validation.

    Attributes:
        every_minutes: Inside an epoch, whenever so much time has passed since the last time; 0 for never.
        every_steps: Inside an epoch, after every so many steps of the run.
        keep_every_epochs: The checkpoint after every so many epochs is kept for good; of the others only the last ones
            and the best ones are.
    """

    every_minutes: NotNegative = 10.0
    every_steps: Count | None = None
    keep_every_epochs: Count | None = None
