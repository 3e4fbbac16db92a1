"""The configuration of what is looked at and written down while a run trains: the audit, and tracking."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mtl.config.types import Count, Strict


class AuditConfig(Strict):
    """What the gradient audit does, see docs/audit.md.

    Attributes:
        policy: What happens at a violation: `raise` ends the run, `warn` logs it and continues, `collect` only records
            it, `restore` puts the frozen bits back and continues.
        gradients_every_steps: The tasks' gradients on the trunk are compared on the first step of each phase, and then
            every this many steps; 0 for never. Each comparison costs a backward per task.
    """

    policy: Literal["raise", "warn", "collect", "restore"] = "raise"
    gradients_every_steps: Annotated[int, Field(ge=0)] = 500


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
