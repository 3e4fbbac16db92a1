"""The configuration of what is looked at and written down while a run trains: the audit, and tracking."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mtl.config.types import Count, Strict


class AuditConfig(Strict):
    """What is looked at beyond the losses.

    Attributes:
        policy: What a violation of the contract does: `raise` stops the run, `warn` and `collect` go on, `restore`
            mends it.
        gradients_every_steps: The tasks' gradients on the trunk are compared on the first step of each phase and on
            every such step after it; 0 for never. Costs a backward per task.
    """

    policy: Literal["raise", "warn", "collect", "restore"] = "raise"
    gradients_every_steps: Annotated[int, Field(ge=0)] = 500


class TrackingConfig(Strict):
    """wandb.

    Attributes:
        project: The project's name.
        mode: `auto`: as WANDB_MODE says, else online if wandb knows a key, else offline. Any other word goes before
            WANDB_MODE.
        log_every_steps: How many steps are logged at once.
    """

    project: str = "mtl"
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    log_every_steps: Count = 20
