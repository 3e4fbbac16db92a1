"""Metrics that are means over labelled entries."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from mtl.tasks.metrics import Metrics


class Means(Metrics):
    """Sums of some numbers of each labelled entry, float64, and how many entries there are."""

    num_terms: int

    def __init__(self) -> None:
        self.sums: Tensor | None = None

    @abstractmethod
    def terms(self, output: Tensor, label: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Which entries are labelled, bool, and the numbers of each entry, float64, in the same shape.

        An error that is NaN counts as infinite.
        """

    @abstractmethod
    def finish(self, means: Sequence[float]) -> dict[str, float]:
        """The metrics from the means; these are NaN without any label."""

    def update(self, output: Tensor, label: Tensor) -> None:
        mask, rows = self.terms(output, label)
        sums = [mask.sum().double()]
        sums += [torch.where(mask, row.nan_to_num(torch.inf, torch.inf, -torch.inf), 0).sum() for row in rows]
        self.sums = torch.stack(sums) if self.sums is None else self.sums + torch.stack(sums)

    def compute(self) -> dict[str, float]:
        count, *sums = self.state()[0].tolist()
        return self.finish([each / count if count else torch.nan for each in sums])

    def state(self) -> list[Tensor]:
        return [torch.zeros(1 + self.num_terms, dtype=torch.float64) if self.sums is None else self.sums]

    def load_state(self, state: Sequence[Tensor]) -> None:
        (self.sums,) = state
