"""Dynamic weight averaging where some steps lack labels of some tasks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtl.optim.balance.scalarizers import DWA
from mtl.optim.balance.subset import Subset


class PartialDwa(DWA):
    """TorchJD's DWA; a task's average over a pass is that over the steps in which it has labels.

    A task that had none in a whole pass keeps its average of the pass before, so that its rate is 1.
    """

    _loss_sum: Tensor | None
    _n_batches: int | Tensor  # type: ignore[assignment]
    _previous_averages: list[Tensor]

    def forward(self, values: Tensor, /) -> Tensor:
        seen = values.detach()
        self._loss_sum = seen.clone() if self._loss_sum is None else self._loss_sum + seen
        # Not in place, as TorchJD counts: a copy of the state may hold it.
        self._n_batches = self._n_batches + 1
        return (self._weights_of(values, self._previous_averages) * values).sum()

    def combine(self, losses: Tensor, subset: Subset) -> Tensor:
        """The loss of some of the tasks, a scalar.

        Args:
            losses: Those of these tasks, in order.
            subset: Which tasks.
        """
        index, seen = subset.index(losses.device), losses.detach()
        if self._loss_sum is None:
            self._loss_sum = seen.new_zeros(subset.size)
        # From here to the pass's end, steps are counted by task.
        counts = torch.as_tensor(self._n_batches, dtype=seen.dtype, device=seen.device).expand(subset.size)
        self._n_batches = counts.index_add(0, index, torch.ones_like(seen))
        self._loss_sum = self._loss_sum.index_add(0, index, seen)
        averages = [average.index_select(0, index) for average in self._previous_averages]
        return (self._weights_of(losses, averages) * losses).sum()

    def step(self) -> None:
        """Ends a pass; the average of a task without labels in it is that of the pass before, NaN if there is none."""
        before = self._previous_averages[-1:]
        super().step()
        if before and len(self._previous_averages) == 2:
            last = self._previous_averages[-1]
            self._previous_averages[-1] = torch.where(last.isnan(), before[0], last)

    def _weights_of(self, losses: Tensor, averages: Sequence[Tensor]) -> Tensor:
        if len(averages) < 2:
            return torch.ones_like(losses)
        older, newer = averages
        rates = newer / older
        # A task whose averages are not both known has a rate of 1.
        return len(losses) * torch.softmax(torch.where(rates.isnan(), 1, rates) / self.temperature, dim=0)
