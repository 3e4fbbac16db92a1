"""The one way into a phase's freeze: for the run, `mtl bench`, the trial of layouts, and the plan's rehearsals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from mtl.freeze import FreezePlan, enforce


@contextmanager
def entered(root: nn.Module, plan: FreezePlan) -> Iterator[None]:
    """Enforces a freeze: clears gradients, sets `requires_grad` by plan, and puts frozen modules in eval mode.

    No tensor has a gradient after the block either. What is frozen stays so until another phase is entered.

    Args:
        root: The model with the tasks and the balancing method, as the plan names them.
        plan: The phase's.
    """
    enforce(root, plan)
    try:
        yield
    finally:
        for parameter in root.parameters():
            parameter.grad = None
