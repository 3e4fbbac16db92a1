"""What a balancing method that looks at the tasks' gradients receives, and what it makes of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mtl.config import SettingError
from mtl.optim.balance.row_shards import RowShards
from mtl.optim.balance.state import check_same_method
from mtl.optim.balance.subset import Subset
from mtl.optim.task_gradients import inner_products, row_squares

# What a method may raise for options that do not fit each other or the number of tasks.
OPTION_ERRORS = (TypeError, ValueError, RuntimeError, IndexError)


@dataclass(frozen=True)
class TaskGradients:
    """The tasks' gradients in a step: the same on all ranks, or this rank's shards of them.

    Sums over entries are taken by its methods, which add up those of all shards.

    Attributes:
        rows: "t p", float32: the gradients of the tasks' losses on what they share; means over the step's batches.
            Under FSDP the entries of this rank's shards, which may be none.
        losses: "t", the tasks' losses: means over the step's batches.
        batches: The rows of each batch of a step of several batches, for a method that asks for them; else none.
        subset: The tasks, if not all have labels in the step.
        rows_of: Identifies what the rows are gradients of, the same in every step, run and rank; "" if that is unknown.
        shards: How rows are split over the ranks; None if each rank has them whole.
    """

    rows: Tensor
    losses: Tensor
    batches: tuple[Tensor, ...] = ()
    subset: Subset | None = None
    rows_of: str = ""
    shards: RowShards | None = None

    @cached_property
    def products(self) -> Tensor:
        """The Gramian of the rows, "t t", float64, on the CPU; computed once."""
        return self.products_of(self.rows.detach()).cpu()

    @property
    def norms(self) -> Tensor:
        """The Euclidean norms of the rows, "t", float64."""
        return self.norms_of(self.rows.detach())

    def products_of(self, rows: Tensor, others: Tensor | None = None) -> Tensor:
        """The products, "t t", float64, of rows that are split as these are, with each other or with others."""
        return self.total(inner_products(rows, others))

    def norms_of(self, rows: Tensor) -> Tensor:
        """The Euclidean norms, "t", float64, of rows that are split as these are."""
        return self.total(row_squares(rows)).sqrt()

    def total(self, sums: Tensor) -> Tensor:
        """Sums over the entries of whole rows, of those over the entries that are here."""
        return sums if self.shards is None else self.shards.world.sum(sums)

    def uniform(self) -> Tensor:
        """A random number from 0 to 1 for each entry, "p", which does not depend on how many ranks there are."""
        if self.shards is None:
            return torch.rand_like(self.rows[0])
        # Whole, as one process draws them: memory of one gradient that is not sharded.
        return self.shards.here(torch.rand(self.shards.size, dtype=self.rows.dtype, device=self.rows.device))

    @property
    def tasks(self) -> Subset:
        """The places of the tasks among all that the method was made for."""
        return self.subset or Subset(tuple(range(len(self.rows))), len(self.rows))

    def of(self, places: list[int]) -> TaskGradients:
        """Those of some of the tasks, by their places among these."""
        known = self.tasks
        left = Subset(tuple(known.places[place] for place in places), known.size)
        index = torch.tensor(places, device=self.rows.device)
        return replace(
            self,
            rows=self.rows[index],
            losses=self.losses[index.to(self.losses.device)],
            batches=tuple(rows[index] for rows in self.batches),
            subset=left,
        )


@dataclass(frozen=True)
class Combined:
    """What a method makes of a step's gradients.

    Attributes:
        gradient: "p", the gradient of what the tasks share; None if there are `weights`.
        weights: "t", by which the tasks' gradients are added up.
        head_weights: "t", by which each task's gradient on its own parameters is multiplied; all 1 if None.
    """

    gradient: Tensor | None = None
    weights: Tensor | None = None
    head_weights: Tensor | None = None

    def of(self, rows: Tensor) -> Tensor:
        """The gradient, "p"; of other rows "t p" than the method has seen, if it has given weights."""
        if self.gradient is not None:
            return self.gradient
        assert self.weights is not None
        return self.weights.to(rows) @ rows


class GradientMethod(ABC):
    """A balancing method that looks at the tasks' gradients.

    Not a module: it has no parameters, and its state moves to the gradients' device by itself.

    Attributes:
        weighs: Whether it gives weights. Others make a gradient of their own, of the whole rows.
        remembers_rows: Whether it keeps the rows of earlier steps, or something of their size.
        needs_whole_rows: Whether it cannot do with the entries of one rank's shards, and sums over all.
        needs_positive_losses: Whether it divides by losses or multiplies with them, so that their sign counts.
        num_batches: How many batches, independent of each other, it compares in a step.
        least_tasks: Steps in which fewer tasks have a gradient than this are the sum of the gradients.
    """

    weighs: bool = True
    remembers_rows: bool = False
    needs_whole_rows: bool = False
    needs_positive_losses: bool = False
    num_batches: int = 1
    least_tasks: int = 2

    def combine(self, gradients: TaskGradients) -> Combined:
        """What a step's gradients become. Waits for the device.

        A task without a gradient leaves the step, as if the method had fewer tasks; what it remembers of such a task
        stays. That is done here, for every method: `_combine` sees no gradient that is zero. Where a gradient or a loss
        is not finite, the result is not finite either, and the state stays.

        Raises:
            SettingError: The method cannot combine so few tasks, or losses that are negative.
        """
        largest = self._magnitudes(gradients)
        *sizes, loss = torch.cat([largest, gradients.losses.to(largest).sum()[None]]).tolist()
        ones = torch.ones(len(sizes))
        if not all(value < torch.inf for value in [*sizes, abs(loss)]):
            return Combined(weights=ones * torch.nan)
        if self.needs_positive_losses:
            self._check_losses(gradients)
        here = [place for place, value in enumerate(sizes) if value > 0]
        if len(here) < self.least_tasks:
            return Combined(weights=ones)
        self._begin(gradients)
        if len(here) == gradients.tasks.size:
            return self._combine(gradients)
        try:
            if len(here) == len(sizes):
                return self._combine(gradients)
            found = self._combine(gradients.of(here))
        except OPTION_ERRORS as error:
            few = f"the {len(here)} of {gradients.tasks.size} tasks"
            message = f"{self.name} cannot combine {few} that have a gradient in a step: {error}"
            raise SettingError("balance.method", message) from error
        index = torch.tensor(here)
        heads = None if found.head_weights is None else ones.index_copy(0, index, found.head_weights.cpu().float())
        if found.weights is None:
            return replace(found, head_weights=heads)
        weights = torch.zeros_like(ones).index_copy(0, index, found.weights.cpu().float())
        return replace(found, weights=weights, head_weights=heads)

    def _check_losses(self, gradients: TaskGradients) -> None:
        """Raises `SettingError` for a loss below 0, whose task would be trained the wrong way round."""
        for place, loss in zip(gradients.tasks.places, gradients.losses.tolist(), strict=True):
            if loss < 0:
                task = f"task {place + 1} of {gradients.tasks.size}"
                raise SettingError("balance.method", f"{self.name} needs losses of 0 or more, got {loss:.4g} of {task}")

    def _magnitudes(self, gradients: TaskGradients) -> Tensor:
        """How large each task's gradient is, "t": 0 if it has none, not finite if an entry is not."""
        rows = gradients.rows.detach()
        # A shard may have no entries.
        here: Tensor = torch.linalg.vector_norm(rows, torch.inf, dim=1) if rows.shape[1] else rows.new_zeros(len(rows))
        # In float64 a sum of what is finite is finite.
        return here if gradients.shards is None else gradients.total(here.double())

    @property
    def name(self) -> str:
        """As messages call it."""
        return type(self).__name__

    def _begin(self, gradients: TaskGradients) -> None:  # noqa: B027  (most methods have nothing to do)
        """Called before `_combine`, with the gradients of all tasks of the step."""

    @abstractmethod
    def _combine(self, gradients: TaskGradients) -> Combined:
        """As `combine`: all is finite, and every task has a gradient."""

    def state(self) -> dict[str, Any]:
        """A copy of what it remembers from step to step."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restores the state of the same method.

        Raises:
            ValueError: It is the state of another method.
        """
        check_same_method(self.state(), state)
