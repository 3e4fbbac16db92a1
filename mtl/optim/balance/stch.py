"""Smooth Tchebycheff scalarization, of the losses or of their logarithms."""

from __future__ import annotations

import torch
from torch import Tensor

from mtl.optim.balance.scalarizers import STCH, Scalarizer
from mtl.optim.balance.subset import Subset


class LogStch(Scalarizer):
    """Lin et al., "Smooth Tchebycheff Scalarization for Multi-Objective Optimization" (ICML 2024), as LibMTL trains it.

    For `warmup_epochs` passes over the data the loss is the sum of the losses' logarithms; over the next pass, in which
    it stays so, each task's mean loss is measured, its nadir n_i; from then on the loss is T mu logsumexp(log(L_i /
    n_i) / mu). Losses have to be positive. A task that has no label in the pass of the nadir has a nadir of 1.
    """

    def __init__(self, num_tasks: int, mu: float = 1.0, warmup_epochs: int = 4) -> None:
        """Args:
        num_tasks: The number of tasks.
        mu: How smooth the maximum is, above 0.
        warmup_epochs: Passes over the data before the one of the nadir, 0 or more.

        Raises:
            ValueError: An option is out of its range.
        """
        super().__init__()
        if mu <= 0 or warmup_epochs < 0:
            raise ValueError(f"expected mu above 0 and warmup_epochs of 0 or more, got {mu} and {warmup_epochs}")
        self.mu = mu
        self.warmup_epochs = warmup_epochs
        self._num_tasks = num_tasks
        self._num_epochs = 0
        # Over the pass of the nadir: the sums of the losses, and the steps with a label, "t".
        self._sums: Tensor | None = None
        self._counts: Tensor | None = None

    def forward(self, values: Tensor, /) -> Tensor:
        return self.combine(values, None)

    def combine(self, losses: Tensor, subset: Subset | None) -> Tensor:
        """The loss of some of the tasks, a scalar.

        Args:
            losses: Those of these tasks, in order.
            subset: Which tasks; all if None.
        """
        index = torch.arange(self._num_tasks, device=losses.device) if subset is None else subset.index(losses.device)
        logs = losses.log()
        if self._num_epochs <= self.warmup_epochs:
            if self._num_epochs == self.warmup_epochs:
                seen, zeros = losses.detach(), losses.new_zeros(self._num_tasks)
                self._sums = (zeros if self._sums is None else self._sums).index_add(0, index, seen)
                counts = zeros if self._counts is None else self._counts
                self._counts = counts.index_add(0, index, torch.ones_like(seen))
            return logs.sum()
        assert self._sums is not None and self._counts is not None
        nadir = torch.where(self._counts > 0, self._sums / self._counts.clamp(min=1), 1.0)[index]
        return len(losses) * self.mu * torch.logsumexp((logs - nadir.log()) / self.mu, dim=0)

    def drop_pass(self) -> None:
        """Forgets a pass that was not finished."""
        if self._num_epochs <= self.warmup_epochs:
            self._sums = self._counts = None

    def step(self) -> None:
        """Ends a pass over the data."""
        self._num_epochs += 1


def stch(
    num_tasks: int,
    mu: float | None = None,
    weights: Tensor | None = None,
    reference: Tensor | None = None,
    log: bool = False,
    warmup_epochs: int | None = None,
) -> Scalarizer:
    """TorchJD's `STCH`, or with `log` the one of logarithms.

    Raises:
        TypeError: Options are missing, or do not go with each other.
    """
    if log:
        if weights is not None or reference is not None:
            raise TypeError("weights and reference do not go with log: true")
        return LogStch(num_tasks, 1.0 if mu is None else mu, 4 if warmup_epochs is None else warmup_epochs)
    if warmup_epochs is not None:
        raise TypeError("warmup_epochs goes with log: true")
    if mu is None:
        raise TypeError("expected mu")
    return STCH(mu, weights, reference)
