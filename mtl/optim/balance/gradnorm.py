"""GradNorm: weights that are learned until all tasks train at one rate."""

from __future__ import annotations

import torch

from mtl.optim.balance.gradient_method import Combined, TaskGradients
from mtl.optim.balance.task_memory import RememberingMethod

_BETAS, _EPS = (0.9, 0.999), 1e-8


class GradNorm(RememberingMethod):
    """Chen et al., "GradNorm: Gradient Normalization for Adaptive Loss Balancing" (ICML 2018, arXiv 1711.02257).

    With weights w, gradient norms G_i = w_i |g_i|, their mean over tasks G, and the tasks' relative inverse training
    rates r_i = (L_i / L_i(0)) / mean_j (L_j / L_j(0)), a step minimises sum_i |G_i - G r_i^alpha| in w (equation 2, G
    and r constant), then scales w to a sum of T, the number of tasks (Algorithm 1). The model's step has the weights
    from before; heads are weighted too, as in the paper.

    Deviations: w is exp(v), so that it stays positive, and Adam steps v; L_i(0) is the mean loss of the first
    `warmup_steps` steps, in which all weights are 1, where the paper has the first batch or log C; norms are those of
    all that the tasks share (`on`), where the paper takes the last shared layer.
    """

    def __init__(self, num_tasks: int, alpha: float = 1.5, lr: float = 0.025, warmup_steps: int = 50) -> None:
        """Args:
        num_tasks: The number of tasks.
        alpha: How strongly rates pull; 0 makes all norms equal.
        lr: That of v.
        warmup_steps: Steps over which the first losses are averaged, 1 or more.

        Raises:
            ValueError: An option is out of its range.
        """
        if alpha < 0 or lr < 0 or warmup_steps < 1:
            got = f"got {alpha}, {lr} and {warmup_steps}"
            raise ValueError(f"expected alpha and lr of 0 or more and warmup_steps of 1 or more, {got}")
        self.alpha = alpha
        self.lr = lr
        self.warmup_steps = warmup_steps
        super().__init__(num_tasks)

    def _combine(self, gradients: TaskGradients) -> Combined:
        tasks, memory = gradients.tasks, self._memory
        norms = gradients.norms.cpu()
        losses = gradients.losses.double().cpu()
        count = memory.count(tasks, norms)
        total = memory.read("first_losses", tasks, norms)
        v = memory.read("v", tasks, norms)
        weights = torch.exp(v)
        weights = weights * len(weights) / weights.sum()
        warm = count <= self.warmup_steps
        memory.write("first_losses", tasks, torch.where(warm, total + losses, total))
        if not warm.any():
            first = total / self.warmup_steps
            ratios = losses / first
            rates = ratios / ratios.mean()
            now = weights * norms
            # d/dv of |w n - target| at w = exp(v).
            slopes = torch.sign(now - now.mean() * rates**self.alpha) * now
            memory.write("v", tasks, v - self._adam(gradients, slopes))
        weights = weights.float()
        return Combined(weights=weights, head_weights=weights)

    def _adam(self, gradients: TaskGradients, slopes: torch.Tensor) -> torch.Tensor:
        tasks, memory = gradients.tasks, self._memory
        steps = memory.read("adam_steps", tasks, slopes) + 1
        one = memory.read("adam_mean", tasks, slopes).lerp(slopes, 1 - _BETAS[0])
        two = memory.read("adam_square", tasks, slopes).lerp(slopes.square(), 1 - _BETAS[1])
        for name, value in (("adam_steps", steps), ("adam_mean", one), ("adam_square", two)):
            memory.write(name, tasks, value)
        mean, square = one / (1 - _BETAS[0] ** steps), two / (1 - _BETAS[1] ** steps)
        return self.lr * mean / (square.sqrt() + _EPS)
