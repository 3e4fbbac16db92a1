"""Per-step numbers, collected on the device and logged a few steps at a time, so that no step waits for the device."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mtl.tracking import Tracker


class StepLog:
    """The steps of one epoch.

    Attributes:
        latest: The newest known losses, for the progress bar.
    """

    def __init__(self, tracker: Tracker, tasks: Sequence[str], every_steps: int, phase: str, epoch: int) -> None:
        self._tracker = tracker
        self._names = ["train/loss", *[f"train/loss/{task}" for task in tasks]]
        self._short = ["loss", *tasks]
        self._every_steps = every_steps
        self._common: dict[str, int | str] = {"epoch": epoch, "phase": phase}
        self._pending: list[tuple[int, float, Tensor]] = []
        self._num_images = self._pending_images = 0
        self._start = self._since = time.perf_counter()
        self._loss_sum, self._num_steps = 0.0, 0
        self.latest = ""

    def add(self, step: int, losses: Sequence[Tensor], lr: float, num_images: int) -> None:
        """Takes note of a step.

        Args:
            step: Steps done in the run, this one included.
            losses: For each of its batches the balanced loss and the tasks' losses, "1+t".
            lr: The highest learning rate used.
            num_images: Images it took.
        """
        self._pending.append((step, lr, losses[0] if len(losses) == 1 else torch.stack(list(losses)).mean(0)))
        self._pending_images += num_images
        if len(self._pending) >= self._every_steps:
            self.flush()

    def flush(self) -> None:
        """Logs the steps since the last flush; the only place that waits for the device.

        Raises:
            FloatingPointError: A loss is not finite.
        """
        if not self._pending:
            return
        values = torch.stack([row for _, _, row in self._pending]).tolist()
        now = time.perf_counter()
        rate = self._pending_images / (now - self._since)
        for (step, lr, _), row in zip(self._pending, values, strict=True):
            numbers = dict(zip(self._names, row, strict=True))
            self._tracker.log({"step": step, **self._common, **numbers, "train/lr": lr, "perf/images_per_s": rate})
            for name, value in numbers.items():
                if not math.isfinite(value):
                    raise FloatingPointError(
                        f"{name} is {value} at step {step} of phase {self._common['phase']!r};"
                        " a lower learning rate or fp32 precision may help"
                    )
            self._loss_sum += row[0]
        self._num_steps += len(values)
        self._num_images += self._pending_images
        self.latest = " ".join(f"{name} {value:.3f}" for name, value in zip(self._short, values[-1], strict=True))
        self._pending, self._pending_images, self._since = [], 0, now

    def add_row(self, step: int, numbers: Mapping[str, float]) -> None:
        """Logs other numbers of a step that is still to be added, behind the steps before it: no step goes back."""
        self.flush()
        self._tracker.log({"step": step, **self._common, **numbers})

    @property
    def mean_loss(self) -> float:
        return self._loss_sum / max(1, self._num_steps)

    @property
    def images_per_s(self) -> float:
        """Training images a second from the epoch's begin to the last flush."""
        return self._num_images / max(1e-9, self._since - self._start)
