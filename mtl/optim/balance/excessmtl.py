"""ExcessMTL: weights that follow how far each task still is from its best."""

from __future__ import annotations

import torch

from mtl.optim.balance.gradient_method import Combined, TaskGradients
from mtl.optim.balance.task_memory import RememberingMethod

_EPS = 1e-7


class ExcessMtl(RememberingMethod):
    """He et al., "Robust Multi-Task Learning with Excess Risks" (ICML 2024), Algorithm 1, with the numbers of TorchJD.

    The excess risk of a task is estimated as e_i = sum_p g_ip^2 / sqrt(s_ip + 1e-7), with s the sum of squares so far
    (equations 6 and 7), and divided by its baseline (section 3.2); weights are multiplied by exp(step e_i) and
    normalised to a sum of 1 (equation 9). The baseline is the first estimate, or the mean of those of `n_warmup_steps`
    steps, in which the weights stay. Heads get the gradients of their own losses.

    TorchJD's own class cannot begin with some of its tasks: here each task has its own count and baseline, and with
    labels of all tasks the weights are TorchJD's. Of features (`on`) the gradients are summed over images: those of a
    bias that all images share, so that each entry is the same one in every step.

    Memory: a square for each entry of the tasks' gradients, which checkpoints have too. Where a phase trains other
    parameters than the one before, squares, counts and baselines begin with zeros again, and the weights stay.
    """

    remembers_rows = True
    _kept = ("logs",)

    def __init__(self, num_tasks: int, robust_step_size: float = 1.0, n_warmup_steps: int = 1) -> None:
        """Args:
        num_tasks: The number of tasks.
        robust_step_size: That of the weights, above 0.
        n_warmup_steps: Steps whose mean is the baseline; 0, TorchJD's default, takes the first estimate, and moves the
            weights by it as it is: of a trunk of some million parameters it is in the thousands, so that one task has
            all the weight from then on.

        Raises:
            ValueError: An option is out of its range.
        """
        if robust_step_size <= 0 or n_warmup_steps < 0:
            raise ValueError(
                f"expected robust_step_size above 0 and n_warmup_steps of 0 or more, got {robust_step_size} and"
                f" {n_warmup_steps}"
            )
        self.robust_step_size = robust_step_size
        self.n_warmup_steps = n_warmup_steps
        super().__init__(num_tasks)

    def _combine(self, gradients: TaskGradients) -> Combined:
        tasks, rows, memory = gradients.tasks, gradients.rows, self._memory
        squares = rows.square()
        sums = memory.read("squares", tasks, rows) + squares
        memory.write("squares", tasks, sums)
        excess = gradients.total((squares / torch.sqrt(sums + _EPS)).sum(dim=1))
        counts = memory.count(tasks, excess)
        baseline = memory.read("baseline", tasks, excess)
        num = max(1, self.n_warmup_steps)
        memory.write("baseline", tasks, torch.where(counts <= num, baseline + excess / num, baseline))
        # The logarithm of the weight, from 0; a common factor leaves the softmax as it is.
        logs = memory.read("logs", tasks, excess)
        first = excess if self.n_warmup_steps == 0 else torch.zeros_like(excess)
        scaled = torch.where(counts <= num, first, excess / (baseline + _EPS))
        logs = torch.log_softmax(logs + scaled * self.robust_step_size, dim=0)
        memory.write("logs", tasks, logs)
        return Combined(weights=torch.exp(logs))
