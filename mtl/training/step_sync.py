"""Flags that the ranks of a run all-reduce, and decisions they take together; a single process decides by itself."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from mtl.audit import GradientAudit
from mtl.data import Batch
from mtl.distributed.world import World, shares_of_means
from mtl.freeze import FreezePlan, free_norm_statistics
from mtl.optim.balance.subset import Subset
from mtl.runtime.signals import Interrupt, Stopped
from mtl.tasks import Task


@dataclass(frozen=True)
class StepTasks:
    """The tasks of a step.

    Attributes:
        names: Those of the phase's tasks of which its images have labels.
        lacking: The others.
        subset: The places of `names`, for the balancing method; None if nothing is lacking.
    """

    names: tuple[str, ...]
    lacking: tuple[str, ...] = ()
    subset: Subset | None = None


@lru_cache(maxsize=64)
def _step_tasks(tasks: tuple[str, ...], has_label: tuple[bool, ...]) -> StepTasks:
    places = tuple(place for place, has in enumerate(has_label) if has)
    if len(places) == len(tasks):
        return StepTasks(tasks)
    lacking = tuple(name for name, has in zip(tasks, has_label, strict=True) if not has)
    return StepTasks(tuple(tasks[place] for place in places), lacking, Subset(places, len(tasks)))


class StepSync:
    """One for each run.

    Attributes:
        world: The processes.
        seconds: Those between the last two messages, by the clock of rank 0.
        is_asked_to_end: Whether any rank was, as all know since the last message.
    """

    def __init__(self, world: World, audit: GradientAudit, asked: Interrupt, are_statistics_shared: bool) -> None:
        """Args:
        world: The processes.
        audit: That of this process.
        asked: The signals that this process was sent.
        are_statistics_shared: Whether norm layers have the same statistics on all ranks by themselves.
        """
        self.world = world
        self._audit = audit
        self._asked = asked
        self._are_equal = world.is_alone or are_statistics_shared
        self._is_broken = False
        self._clock = time.perf_counter()
        self.seconds = 0.0
        self.is_asked_to_end = False

    def begin_phase(self) -> None:
        """Time counts from now on."""
        self._clock, self._is_broken = time.perf_counter(), False

    def exchange(self) -> float:
        """Sends and gets one message; returns the seconds since the last one, by the clock of rank 0."""
        before, self._clock = self._clock, time.perf_counter()
        known = self.world.all_reduce_flags(bool(self._asked.name), not self._audit.holds, self._clock - before)
        self.is_asked_to_end, self._is_broken = known.stop, known.broken
        self.seconds = known.seconds
        return known.seconds

    def exit_if_asked(self, step: int) -> None:
        """Raises `Stopped` if the run was asked to end; its state was saved just now."""
        if self.is_asked_to_end:
            reason = self._asked.name or "another process"
            raise Stopped(f"stopped by {reason} after step {step}; all is saved")

    @property
    def holds(self) -> bool:
        """Whether no violation of the contract was found: with several processes, by none until the last message."""
        return self._audit.holds if self.world.is_alone else not self._is_broken

    def tasks(self, window: Sequence[Batch], tasks: Sequence[str]) -> StepTasks:
        """The tasks of a step: which of a phase's tasks have a label in one of its images, on any rank."""
        has_label = [any(name not in batch.lacking for batch in window) for name in tasks]
        has_label = self.world.is_any(has_label)
        return _step_tasks(tuple(tasks), tuple(has_label))

    def shares(self, window: Sequence[Batch], tasks: Mapping[str, Task]) -> Sequence[Tensor | None]:
        """The weights of a step's losses, for each batch "t" or None for 1, which make it the step of one batch."""
        if not tasks or (len(window) == 1 and self.world.is_alone):
            return [None] * len(window)
        weights = torch.stack(
            [
                torch.stack([task.weight(batch.labels[name]).double() for name, task in tasks.items()])
                for batch in window
            ]
        )
        totals = self.world.mean(weights.sum(0)) * self.world.size
        return list(shares_of_means(weights, totals, self.world.size))

    def average_statistics(self, root: nn.Module, plan: FreezePlan) -> None:
        """Averages the statistics of trainable norm layers over the ranks; proves that all else is the same on them."""
        if not self._are_equal:
            self.world.average_buffers(root, free_norm_statistics(root, plan))
        if not self.world.is_alone:
            self._audit.agree(buffers=True)

    @contextmanager
    def averaged_statistics(self, root: nn.Module, plan: FreezePlan) -> Iterator[dict[str, Tensor]]:
        """As `average_statistics`, for the time of the block: training continues as if it had not been saved.

        Yields:
            Copies of this rank's own statistics of trainable norm layers; none if all ranks have the same.
        """
        names = [] if self._are_equal else free_norm_statistics(root, plan)
        own = {name: root.get_buffer(name).clone() for name in names}
        self.average_statistics(root, plan)
        yield own
        load_buffers(root, own)


@torch.no_grad()
def load_buffers(root: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copies values, such as a rank's own norm statistics, into the buffers of their names."""
    for name, value in values.items():
        root.get_buffer(name).copy_(value)
