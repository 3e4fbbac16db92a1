"""The `tracking` component of a configuration."""

from __future__ import annotations

from typing import Literal

from mtl.config.types import Count, Strict


class TrackingConfig(Strict):
    """wandb.

    Attributes:
        project: The project's name.
        mode: `auto`: WANDB_MODE if it is set, else online if wandb has an API key, else offline. Any other value
            overrides WANDB_MODE.
        log_every_steps: How many steps are logged at once.
    """

    project: str = "mtl"
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    log_every_steps: Count = 20
