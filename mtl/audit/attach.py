"""Audits a loop from outside, without an edit of it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from mtl.audit.audit import GradientAudit
from mtl.audit.watch.reporting import Policy
from mtl.patterns import PatternLike


def attach(
    model: nn.Module,
    *optimizers: Optimizer,
    freeze: PatternLike | Sequence[PatternLike],
    policy: Policy = "raise",
    phase: str = "training",
    idle: PatternLike | Sequence[PatternLike] = (),
    strict: bool = False,
) -> GradientAudit:
    """Audits a loop without an edit of it: looks at every step of these optimizers from now on.

    Returns:
        The audit, with an open phase: its `end()` compares every byte, and asks whether all that was to train did.

    Raises: as for `GradientAudit`, its `attach`, and `begin`.
    """
    audit = GradientAudit(model, freeze, policy=policy, strict=strict)
    audit.attach(*optimizers)
    audit.begin(phase, idle=idle)
    return audit
