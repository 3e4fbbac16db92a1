"""What the processes of a run tell each other and decide alike; alone, a process decides by itself."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mtl.audit import GradientAudit
from mtl.data import Batch
from mtl.distributed.world import World, shares_of_means
from mtl.freeze import FreezePlan, free_norm_statistics
from mtl.runtime.signals import Interrupt
from mtl.tasks import Task


class Consensus:
    """One for each run.

    Attributes:
        clock: When the last message was sent, by `time.perf_counter`.
        seconds: What it said of the time before it.
        is_asked_to_end: Whether any process was, as all know since the last message.
    """

    def __init__(self, world: World, audit: GradientAudit, asked: Interrupt, are_statistics_shared: bool) -> None:
        """Args:
        world: The processes.
        audit: That of this process.
        asked: The signals that this process was sent.
        are_statistics_shared: Whether norm layers have the same statistics in all processes by themselves.
        """
        self._world = world
        self._audit = audit
        self._asked = asked
        self._is_alike = world.is_alone or are_statistics_shared
        self._is_broken = False
        self.clock = time.perf_counter()
        self.seconds = 0.0
        self.is_asked_to_end = False

    def begin_phase(self) -> None:
        """Time counts from now on."""
        self.clock, self._is_broken = time.perf_counter(), False

    def tell(self) -> float:
        """Sends and gets one message; returns the seconds since the last one, by the clock of the first process."""
        before, self.clock = self.clock, time.perf_counter()
        told = self._world.agree(bool(self._asked.name), not self._audit.holds, self.clock - before)
        self.is_asked_to_end, self._is_broken = told.stop, told.broken
        self.seconds = told.seconds
        return told.seconds

    @property
    def reason_to_end(self) -> str:
        """What asked the run to end."""
        return self._asked.name or "another process"

    @property
    def holds(self) -> bool:
        """Whether nothing was found against the contract: with several processes, by none until the last message."""
        return self._audit.holds if self._world.is_alone else not self._is_broken

    def shares(self, window: Sequence[Batch], tasks: Mapping[str, Task]) -> Tensor | None:
        """What each loss of each batch of a step counts, "m t", so that it is the step of one batch; None if it is."""
        if len(window) == 1 and self._world.is_alone:
            return None
        weights = torch.stack(
            [
                torch.stack([task.weight(batch.labels[name]).double() for name, task in tasks.items()])
                for batch in window
            ]
        )
        totals = self._world.mean(weights.sum(0)) * self._world.size
        return shares_of_means(weights, totals, self._world.size)

    def statistics(self, root: nn.Module, plan: FreezePlan) -> dict[str, Tensor]:
        """Copies of this process's statistics of norm layers that train; none if all have the same."""
        names = [] if self._is_alike else free_norm_statistics(root, plan)
        return {name: root.get_buffer(name).clone() for name in names}

    def prove(self, root: nn.Module, plan: FreezePlan) -> None:
        """Makes statistics of norm layers that train the same in all processes, and proves that all else is."""
        if not self._is_alike:
            self._world.average_buffers(root, free_norm_statistics(root, plan))
        if not self._world.is_alone:
            self._audit.agree(buffers=True)


@torch.no_grad()
def put_back(root: nn.Module, statistics: Mapping[str, Tensor]) -> None:
    """Puts statistics back where `Consensus.statistics` took them."""
    for name, value in statistics.items():
        root.get_buffer(name).copy_(value)
