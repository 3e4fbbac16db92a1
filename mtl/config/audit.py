"""The `audit` component of a configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mtl.config.types import Strict


class AuditConfig(Strict):
    """What is measured besides the losses.

    Attributes:
        policy: What a violation of the contract does: `raise` stops the run, `warn` and `collect` continue, `restore`
            writes the frozen values back.
        gradients_every_steps: The tasks' gradients on the trunk are compared on the first step of each phase and on
            every such step after it; 0 for never. Costs a backward per task.
    """

    policy: Literal["raise", "warn", "collect", "restore"] = "raise"
    gradients_every_steps: Annotated[int, Field(ge=0)] = 500
