"""Metrics that are averages over images or batches of numbers that each of these has."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from mtl.tasks.metrics import Metrics


class Averages(Metrics):
    """Sums of rows of numbers, float64, and how many rows there are; a row without any label does not count.

    Attributes:
        names: The names of the metrics.
        num_numbers: How many numbers a row has.
    """

    names: ClassVar[tuple[str, ...]]
    num_numbers: int

    def __init__(self) -> None:
        self.sums: Tensor | None = None

    @abstractmethod
    def rows(self, output: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of a batch "n m", float64, and which of them count, "n", bool."""

    def finish(self, means: Sequence[float]) -> Sequence[float]:
        """The metrics, in the order of `names`, from the means of the rows' numbers."""
        return means

    def update(self, output: Tensor, label: Tensor) -> None:
        rows, counts = self.rows(output, label)
        worst = rows.nan_to_num(torch.inf, torch.inf, -torch.inf)
        sums = torch.cat([counts.sum().double()[None], torch.where(counts[:, None], worst, 0).sum(dim=0)])
        self.sums = sums if self.sums is None else self.sums + sums

    def compute(self) -> dict[str, float]:
        count, *sums = self.state()[0].tolist()
        values = self.finish([each / count for each in sums]) if count else [torch.nan] * len(self.names)
        return dict(zip(self.names, values, strict=True))

    def state(self) -> list[Tensor]:
        return [torch.zeros(1 + self.num_numbers, dtype=torch.float64) if self.sums is None else self.sums]

    def load_state(self, state: Sequence[Tensor]) -> None:
        (self.sums,) = state


def mean_where(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over all but the first axis where `mask`, "n"; 0 where that is nowhere; no host sync."""
    total = torch.where(mask, values, 0).flatten(1).sum(dim=1)
    return total / mask.flatten(1).sum(dim=1).clamp(min=1)
