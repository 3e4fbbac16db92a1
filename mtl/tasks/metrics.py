"""The interface of a task's metrics: statistics that are counted batch by batch, and merged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from mtl.runtime.best import Direction


class Metrics(ABC):
    """Sufficient statistics of one task over a data set, on the device; statistics of two parts of it are merged.

    Attributes:
        adds_up: Whether statistics of two parts are added; else they are joined along their first axis, in any order.
        higher: Its metrics whose higher values are better; one that is in neither has no known direction.
        lower: Those whose lower values are better.
    """

    adds_up: bool = True
    higher: Sequence[str] = ()
    lower: Sequence[str] = ()

    @property
    def parts(self) -> Sequence[Metrics]:
        """The metrics that it is made of, whose statistics are merged each by itself."""
        return (self,)

    @abstractmethod
    def update(self, output: Tensor, label: Tensor) -> None:
        """Counts one batch; `output` is what the head returned, `label` as the task's loss takes it."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """The metrics so far; NaN if there was no label."""

    def direction(self, metric: str) -> Direction | None:
        """Which values of a metric are better; None if that is not known."""
        return "higher" if metric in self.higher else "lower" if metric in self.lower else None

    def state(self) -> list[Tensor]:
        """The statistics as tensors; before the first batch zeros, or without rows if they are joined.

        Raises:
            NotImplementedError: The class does not implement it; then only one process can validate.
        """
        raise NotImplementedError(f"{type(self).__name__} has no state and load_state; several ranks need them")

    def load_state(self, state: Sequence[Tensor]) -> None:
        """Replaces the statistics by others, in the form of `state`.

        Raises:
            NotImplementedError: As for `state`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no state and load_state; several ranks need them")


class Several(Metrics):
    """Several metrics as one."""

    def __init__(self, metrics: Sequence[Metrics]) -> None:
        parts = [part for one in metrics for part in one.parts]
        self._parts = parts
        self.higher = [name for part in parts for name in part.higher]
        self.lower = [name for part in parts for name in part.lower]

    @property
    def parts(self) -> Sequence[Metrics]:
        return self._parts

    def update(self, output: Tensor, label: Tensor) -> None:
        for part in self._parts:
            part.update(output, label)

    def compute(self) -> dict[str, float]:
        return {name: value for part in self._parts for name, value in part.compute().items()}
