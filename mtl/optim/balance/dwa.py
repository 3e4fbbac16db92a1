"""Dynamic weight averaging where some steps lack labels of some tasks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchjd.scalarization import DWA

from mtl.optim.balance.subset import Subset


class PartialDwa(DWA):
    """TorchJD's DWA; a task's average over a pass is that over the steps in which it has labels.

    A task that had none in a whole pass keeps its average of the pass before, so that its rate is 1.
    """

    _loss_sum: Tensor | None
    _n_batches: int | Tensor  # type: ignore[assignment]
    _previous_averages: list[Tensor]

    def forward(self, values: Tensor, /) -> Tensor:
        if isinstance(self._n_batches, Tensor):
            # TorchJD counts in place, and a copy of the state may hold it.
            self._n_batches = self._n_batches.clone()
        return super().forward(values)

    def combine(self, losses: Tensor, subset: Subset) -> Tensor:
        """The loss of some of the tasks, a scalar.

        Args:
            losses: Those of these tasks, in order.
            subset: Which tasks.
        """
        index = subset.index(losses.device)
        if self._loss_sum is None:
            self._loss_sum = losses.new_zeros(subset.size).detach()
        # From here to the pass's end, steps are counted by task.
        counts = torch.as_tensor(self._n_batches, dtype=losses.dtype, device=losses.device).expand(subset.size)
        self._n_batches = counts.index_add(0, index, torch.ones_like(losses.detach()))
        self._loss_sum = self._loss_sum.index_add(0, index, losses.detach())
        if len(self._previous_averages) < 2:
            return losses.sum()
        older, newer = (average.index_select(0, index) for average in self._previous_averages)
        weights = torch.softmax(newer / older / self.temperature, dim=0)
        return (len(losses) * weights * losses).sum()

    def step(self) -> None:
        """Ends a pass."""
        before = self._previous_averages
        is_by_task = isinstance(self._n_batches, Tensor)
        super().step()
        if is_by_task and self._previous_averages:
            last: Any = before[-1] if before else torch.ones_like(self._previous_averages[-1])
            average = self._previous_averages[-1]
            self._previous_averages[-1] = torch.where(average.isnan(), last, average)
