"""Weights that are measured in some first steps, and then stay."""

from __future__ import annotations

import torch

from mtl.optim.balance.gradient_method import Combined, TaskGradients
from mtl.optim.balance.task_memory import RememberingMethod


class ProbeThenFix(RememberingMethod):
    """Our own baseline: fixed weights that make the tasks' gradients equally long, found without a search.

    For `probe_steps` steps all weights are 1 and the norms n_i of the tasks' gradients are averaged; from then on w_i =
    c / mean(n_i), with a sum of T, the number of tasks. That brings the gradient-magnitude similarity 2 n_i n_j /
    (n_i^2 + n_j^2) of Yu et al. (arXiv 2001.06782, Definition 2), taken of the mean norms, to 1 for every pair. Heads
    are weighted too, as by `fixed` weights.
    """

    def __init__(self, num_tasks: int, probe_steps: int = 100) -> None:
        """Args:
        num_tasks: The number of tasks.
        probe_steps: Steps that are measured, 1 or more, of each task.

        Raises:
            ValueError: There are none.
        """
        if probe_steps < 1:
            raise ValueError(f"expected probe_steps of 1 or more, got {probe_steps}")
        self.probe_steps = probe_steps
        super().__init__(num_tasks)

    def _combine(self, gradients: TaskGradients) -> Combined:
        tasks, memory = gradients.tasks, self._memory
        norms = gradients.norms.cpu()
        counts = memory.count(tasks, norms)
        total = memory.read("norms", tasks, norms)
        probes = counts <= self.probe_steps
        memory.write("norms", tasks, torch.where(probes, total + norms, total))
        if probes.any():
            weights = torch.ones_like(norms)
        else:
            weights = 1 / total
            weights = weights * len(weights) / weights.sum()
        return Combined(weights=weights.float(), head_weights=weights.float())
