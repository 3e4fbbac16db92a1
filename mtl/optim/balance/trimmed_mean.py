"""The trimmed mean: of each entry of the gradients, the mean without the extremes."""

from __future__ import annotations

from torchjd import aggregation

from mtl.optim.balance.gradient_method import Combined, GradientMethod, TaskGradients


class TrimmedMean(GradientMethod):
    """TorchJD's `TrimmedMean`; Yin et al., "Byzantine-Robust Distributed Learning" (ICML 2018), Definition 2."""

    weighs = False

    def __init__(self, num_tasks: int, trim_number: int) -> None:
        """Args:
        num_tasks: The number of tasks.
        trim_number: How many of the largest entries, and of the smallest, are left out.

        Raises:
            ValueError: It is negative, or leaves no entry.
        """
        most = (num_tasks - 1) // 2
        if not 0 <= trim_number <= most:
            raise ValueError(f"expected trim_number of 0 to {most} for {num_tasks} tasks, got {trim_number}")
        self._aggregator = aggregation.TrimmedMean(trim_number)

    def _combine(self, gradients: TaskGradients) -> Combined:
        return Combined(gradient=self._aggregator(gradients.rows))
