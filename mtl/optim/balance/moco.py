"""MoCo: a running estimate of each task's gradient, and weights that follow it."""

from __future__ import annotations

import torch

from mtl.optim.balance.gradient_method import Combined, TaskGradients
from mtl.optim.balance.task_memory import RememberingMethod

_EPS = 1e-8


class MoCo(RememberingMethod):
    """Fernando et al., "Mitigating Gradient Bias in Multi-Objective Learning" (ICLR 2023), Algorithm 1.

    As LibMTL has it, with g_i <- L_i g_i / (|g_i| + 1e-8): y_i <- y_i - beta / k^beta_sigma (y_i - g_i), from zeros;
    then lambda <- softmax(lambda - gamma / k^gamma_sigma (y y^T + rho I) lambda), from 1 / T; the shared parameters get
    the sum of lambda_i y_i. k counts the steps that a task was in, in the rate of lambda the largest of them.

    Losses have to be 0 or more.

    Deviation from the paper, as in LibMTL: a softmax where the paper projects onto the simplex. Heads get the gradients
    of their own losses. Memory: the tasks' gradients once more, which checkpoints have too; they begin with zeros again
    where a phase trains other parameters than the one before, and lambda stays.
    """

    weighs = False
    remembers_rows = True
    needs_positive_losses = True
    _kept = ("lambda",)

    def __init__(
        self,
        num_tasks: int,
        beta: float = 0.5,
        beta_sigma: float = 0.5,
        gamma: float = 0.1,
        gamma_sigma: float = 0.5,
        rho: float = 0.0,
    ) -> None:
        """Args:
        num_tasks: The number of tasks.
        beta: The rate of y, above 0 to 1.
        beta_sigma: How fast it falls, 0 or more.
        gamma: The rate of lambda, above 0.
        gamma_sigma: How fast it falls, 0 or more.
        rho: Regularisation of lambda, 0 or more.

        Raises:
            ValueError: An option is out of its range.
        """
        if not 0 < beta <= 1 or gamma <= 0 or min(beta_sigma, gamma_sigma, rho) < 0:
            raise ValueError("expected beta above 0 to 1, gamma above 0, and the others 0 or more")
        self.beta, self.beta_sigma = beta, beta_sigma
        self.gamma, self.gamma_sigma = gamma, gamma_sigma
        self.rho = rho
        super().__init__(num_tasks)

    def _combine(self, gradients: TaskGradients) -> Combined:
        tasks, rows, memory = gradients.tasks, gradients.rows, self._memory
        sizes = gradients.losses.to(rows) / (gradients.norms.to(rows) + _EPS)
        before = memory.read("mean", tasks, rows)
        counts = memory.count(tasks, sizes)
        smooth = before + (self.beta / counts**self.beta_sigma)[:, None] * (rows * sizes[:, None] - before)
        memory.write("mean", tasks, smooth)
        products = gradients.products_of(smooth)
        # Kept as the difference from its beginning, so that it begins with 1 / T.
        begun = torch.full_like(products[0], 1 / tasks.size)
        weights = memory.read("lambda", tasks, begun) + begun
        if len(weights) < tasks.size:
            weights = weights / weights.sum()
        products = products + self.rho * torch.eye(len(weights)).to(products)
        rate = self.gamma / counts.max().to(weights) ** self.gamma_sigma
        weights = torch.softmax(weights - rate * (products @ weights), dim=0)
        memory.write("lambda", tasks, weights - begun)
        return Combined(gradient=weights.to(smooth) @ smooth)
