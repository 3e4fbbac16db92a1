"""Nash-MTL: the weights of the bargaining solution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mtl.optim.balance.gradient_method import Combined, TaskGradients
from mtl.optim.balance.task_memory import RememberingMethod

_MOST_STEPS, _TOLERANCE = 100, 1e-10
# Of gradients that were divided by their norms; larger ones are those of a step that is near to none.
_MOST_WEIGHT = 1e6


def nash_weights(gramian: Tensor) -> Tensor | None:
    """The positive solution a of G a = 1 / a, "t", float64, by Newton's method.

    It is solved for the gradients divided by their norms: C b = 1 / b for the matrix C of their cosines, then a_i = b_i
    / |g_i|. Since G_ij = |g_i| C_ij |g_j|, that is the same solution, and it is as exact at any ratio of the norms.

    b minimises b^T C b / 2 - sum log b, which is strictly convex and self-concordant: damped by the Newton decrement,
    steps stay positive and descend (Nesterov, Lectures on Convex Optimization, section 5.2). There is no solution
    where a positive combination of the gradients is zero (a Pareto-stationary point).

    Args:
        gramian: "t t", positive semidefinite, with a diagonal above 0.

    Returns:
        None if the iterations do not converge.
    """
    gramian = gramian.double().cpu()
    norms = gramian.diagonal().sqrt()
    cosines = gramian / norms[:, None] / norms
    b = 1 / cosines.sum(dim=1).clamp(min=1).sqrt()
    for _ in range(_MOST_STEPS):
        if b.max() > _MOST_WEIGHT:
            return None
        slope = cosines @ b - 1 / b
        # Relative to 1 / b.
        if (slope * b).abs().max() < _TOLERANCE:
            return b / norms
        # In units of b, in which the curvature is at least 1.
        curvature = b[:, None] * cosines * b + torch.eye(len(b)).to(cosines)
        step = b * torch.linalg.solve(curvature, b * slope)
        decrement = float((slope @ step).clamp(min=0).sqrt())
        b = b - step * (1.0 if decrement < 0.25 else 1 / (1 + decrement))
    return None


class NashMtl(RememberingMethod):
    """Navon et al., "Multi-Task Learning as a Bargaining Game" (ICML 2022, arXiv 2202.01017), Algorithm 1.

    The weights a solve G a = 1 / a for the Gramian G of the gradients, divided by its Frobenius norm as in the authors'
    code. If no solution is found, at a Pareto-stationary point, the last weights are used.

    Deviations: Newton's method on the convex problem of which that is the condition, where the authors' code, LibMTL's
    and TorchJD's have up to 20 convex-concave iterations of a solver of cones, which stop short of the solution. Heads
    get the gradients of their own losses, as in TorchJD's `mtl_backward`; the authors' code weighs them too.
    """

    def __init__(self, num_tasks: int, max_norm: float = 1.0, update_weights_every: int = 1) -> None:
        """Args:
        num_tasks: The number of tasks.
        max_norm: The longest gradient that the shared parameters get; 0 for no limit.
        update_weights_every: Steps from one solution to the next; between them the weights stay.

        Raises:
            ValueError: An option is out of its range.
        """
        if max_norm < 0 or update_weights_every < 1:
            raise ValueError(
                f"expected max_norm of 0 or more and update_weights_every of 1 or more, got {max_norm} and"
                f" {update_weights_every}"
            )
        self.max_norm = max_norm
        self.update_weights_every = update_weights_every
        self._num_steps = 0
        super().__init__(num_tasks)

    def _combine(self, gradients: TaskGradients) -> Combined:
        tasks = gradients.tasks
        products = gradients.products
        # Kept as the difference from 1, with which they begin.
        weights = self._memory.read("weights", tasks, products[0]) + 1
        if self._num_steps % self.update_weights_every == 0:
            found = nash_weights(products / products.norm())
            if found is not None:
                weights = found
                self._memory.write("weights", tasks, weights - 1)
        self._num_steps += 1
        length = float((weights @ products @ weights).clamp(min=0).sqrt())
        if self.max_norm and length > self.max_norm:
            weights = weights * (self.max_norm / length)
        return Combined(weights=weights.float())

    def state(self) -> dict[str, Any]:
        return super().state() | {"num_steps": self._num_steps}

    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        self._num_steps = state["num_steps"]
