"""The `audit` component of a configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mtl.config.types import Strict


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
