"""GradDrop: of each entry of the gradients, one sign."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mtl.optim.balance.gradient_method import Combined, GradientMethod, TaskGradients
from mtl.optim.balance.subset import entry_for_each


class GradDrop(GradientMethod):
    """Chen et al., "Just Pick a Sign" (NeurIPS 2020, arXiv 2010.06808), Algorithm 1, lines 10 to 15.

    For each entry, with P = (1 + sum_i g_i / sum_i |g_i|) / 2 and a number U drawn from 0 to 1, the positive g_i are
    kept if P > U, the negative ones if P < U; of the others the share `leak` of each task. With one process to the bit
    TorchJD's `GradDrop`, which draws for the entries that it is given: here they are the same ones where rows are split
    over ranks.

    Deviation: where all gradients of an entry are zero, P is not defined, and the entry is zero.
    """

    weighs = False

    def __init__(self, num_tasks: int, leak: Sequence[float] | None = None) -> None:
        """Args:
        num_tasks: The number of tasks.
        leak: The share of each task's gradient that is not dropped; none if not given.

        Raises:
            ValueError: It does not have an entry for each task.
        """
        self._leak = entry_for_each("leak", [0.0] * num_tasks if leak is None else leak, num_tasks).float()

    def _combine(self, gradients: TaskGradients) -> Combined:
        rows = gradients.rows
        purity = 0.5 * (torch.ones_like(rows[0]) + rows.sum(dim=0) / rows.abs().sum(dim=0))
        drawn = gradients.uniform()
        is_positive, is_negative = purity > drawn, purity < drawn
        total = torch.zeros_like(rows[0])
        for leak, row in zip(self._leak[list(gradients.tasks.places)].to(rows), rows, strict=True):
            kept = is_positive * (row > 0) + is_negative * (row < 0)
            total += (leak + (1 - leak) * kept) * row
        return Combined(gradient=total)
