"""IMTL-G: the gradient whose projections on all tasks' gradients are equal."""

from __future__ import annotations

import torch

from mtl.optim.balance.conflict_free import EPS, weights_of_shares
from mtl.optim.balance.gradient_method import Combined, GradientMethod, TaskGradients


class ImtlG(GradientMethod):
    """Liu et al., "Towards Impartial Multi-task Learning" (ICLR 2021), equation 6: weights with a sum of 1.

    The sum of the gradients with these weights has the same product with each of the unit gradients. It has the
    direction of ConFIG, so that the weights come from the products of unit gradients, at any ratio of the norms:
    TorchJD's `IMTLG` takes the pseudo-inverse of the float32 Gramian itself, and drops a task whose gradient is about
    a thousandth of the others'. Where the weights would have a sum of 0, as where gradients are opposite, they are 0,
    as in TorchJD.
    """

    def __init__(self, num_tasks: int) -> None:
        """Args: `num_tasks` is the number of tasks."""
        self._shares = torch.ones(num_tasks, dtype=torch.float64)

    def _combine(self, gradients: TaskGradients) -> Combined:
        weights = weights_of_shares(gradients.products, self._shares[list(gradients.tasks.places)])
        total = weights.sum()
        # A sum that rounding has left of what cancels is none.
        is_none = total.abs() <= len(weights) * EPS * weights.abs().sum()
        return Combined(weights=torch.where(is_none, 0.0, weights / total).float())
