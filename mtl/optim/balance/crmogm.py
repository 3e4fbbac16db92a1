"""CR-MOGM: the weights of another method, smoothed over steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from mtl.optim.balance.gradient_method import Combined, GradientMethod, TaskGradients
from mtl.optim.balance.task_memory import RememberingMethod


class CrMogm(RememberingMethod):
    """Zhou et al., "On the Convergence of Stochastic Multi-Objective Gradient Manipulation and Beyond" (NeurIPS 2022).

    lambda <- alpha lambda + (1 - alpha) w for the weights w of another method, beginning with w, as TorchJD's
    `CRMOGMWeighting` does. `alpha` is constant, where the paper has a schedule (Corollary 1).
    """

    _kept = ("weights", "counts")

    def __init__(self, method: GradientMethod, num_tasks: int, alpha: float = 0.9) -> None:
        """Args:
        method: Gives the weights.
        num_tasks: The number of tasks.
        alpha: How much of the weights before is kept, 0 to 1.

        Raises:
            ValueError: `alpha` is out of its range, or the method gives no weights.
        """
        if not 0 <= alpha <= 1:
            raise ValueError(f"expected alpha from 0 to 1, got {alpha}")
        if not method.weighs or method.num_batches > 1:
            raise ValueError(f"{method.name} gives no weights of a single batch to smooth")
        self.alpha = alpha
        self._method = method
        # The other method has a memory of its own; that of weights stays.
        self.remembers_rows = method.remembers_rows
        super().__init__(num_tasks)

    def _combine(self, gradients: TaskGradients) -> Combined:
        found = self._method.combine(gradients)
        assert found.weights is not None
        tasks, now = gradients.tasks, found.weights.cpu().float()
        is_first = self._memory.count(tasks, now) == 1
        before = self._memory.read("weights", tasks, now)
        smooth = torch.where(is_first, now, self.alpha * before + (1 - self.alpha) * now)
        self._memory.write("weights", tasks, smooth)
        heads = None if found.head_weights is None else smooth
        return replace(found, weights=smooth, head_weights=heads)

    def state(self) -> dict[str, Any]:
        return super().state() | {"method": self._method.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        self._method.load_state(state["method"])
