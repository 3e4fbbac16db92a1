"""The `tracking` component of a configuration."""

from __future__ import annotations

from typing import Literal

from mtl.config.types import Count, Strict


class TrackingConfig(Strict):
    """Logging to wandb. `metrics.jsonl` gets the same numbers in any case.

    Attributes:
        project: The wandb project.
        mode: `auto`: as the environment variable `WANDB_MODE` says, else online if wandb knows a key, else offline. Any
            other value overrides `WANDB_MODE`.
        log_every_steps: Number of steps that are logged together, each with a row of its own.
    """

    project: str = "mtl"
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    log_every_steps: Count = 20
