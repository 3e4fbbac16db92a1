"""DB-MTL: gradients of logarithms, smoothed, and brought to one length."""

from __future__ import annotations

from mtl.optim.balance.gradient_method import Combined, TaskGradients
from mtl.optim.balance.task_memory import RememberingMethod

_EPS = 1e-8


class DbMtl(RememberingMethod):
    """Lin et al., "Dual-Balancing for Multi-Task Learning" (arXiv 2308.12029), Algorithm 1.

    g_i is the gradient of log(L_i + 1e-8); b_i <- beta_k b_i + (1 - beta_k) g_i with beta_k = beta / k^sigma and zeros
    at first; the shared parameters get the sum of a_i b_i with a_i = max_j |b_j| / (|b_i| + 1e-8), the heads the
    gradient of log(L_i + 1e-8). k counts the steps that a task was in.

    Memory: the tasks' gradients once more, which checkpoints have too. They begin with zeros again where a phase trains
    other parameters than the one before. Losses have to be positive.
    """

    weighs = False
    remembers_rows = True
    needs_positive_losses = True

    def __init__(self, num_tasks: int, beta: float = 0.9, sigma: float = 0.0) -> None:
        """Args:
        num_tasks: The number of tasks.
        beta: How much of the gradients before is kept, 0 to less than 1.
        sigma: How fast that falls, 0 or more.

        Raises:
            ValueError: An option is out of its range.
        """
        if not 0 <= beta < 1 or sigma < 0:
            raise ValueError(f"expected beta from 0 to less than 1 and sigma of 0 or more, got {beta} and {sigma}")
        self.beta = beta
        self.sigma = sigma
        super().__init__(num_tasks)

    def _combine(self, gradients: TaskGradients) -> Combined:
        tasks, rows = gradients.tasks, gradients.rows
        factors = 1 / (gradients.losses.to(rows) + _EPS)
        before = self._memory.read("mean", tasks, rows)
        kept = self.beta / self._memory.count(tasks, factors) ** self.sigma
        smooth = before * kept[:, None] + rows * ((1 - kept) * factors)[:, None]
        self._memory.write("mean", tasks, smooth)
        norms = gradients.norms_of(smooth)
        scales = norms.max() / (norms + _EPS)
        return Combined(gradient=scales.to(smooth) @ smooth, head_weights=factors)
