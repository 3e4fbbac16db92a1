"""Per-step numbers, collected on the device and logged a few steps at a time, so that no step waits for the device."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mtl.training.nonfinite import NotFiniteError
from mtl.training.tracking.backend import Row
from mtl.training.tracking.tracker import Tracker

GRAD_NORM = "train/grad_norm"


# Of a batch, detached: the balanced loss, a scalar, and the losses of the step's tasks, "t".
LossRow = tuple[Tensor, Tensor]


class _Step(NamedTuple):
    """A step that is not logged yet.

    Attributes:
        step: Its number.
        tasks: The tasks of which it had labels.
        lr: The learning rates used, by parameter group.
        losses: Of each of its batches.
        norm: The gradient's norm, a scalar.
        indices: For each of its batches the images' places.
    """

    step: int
    tasks: tuple[str, ...]
    lr: Mapping[str, float]
    losses: Sequence[LossRow]
    norm: Tensor
    indices: list[Tensor]

    def row(self) -> list[Tensor]:
        """The balanced loss, the tasks' losses, and the gradient's norm, in "t+2" elements; not joined yet."""
        total, losses = self.losses[0]
        means = [total.reshape(1), losses]
        if len(self.losses) > 1:
            means = [torch.stack([torch.cat([total.reshape(1), losses]) for total, losses in self.losses]).mean(0)]
        return [*means, self.norm.detach().reshape(1).to(total)]


class StepLog:
    """The steps of one epoch.

    Attributes:
        latest: The newest known losses for the progress bar, the balanced one first, two spaces between them.
        num_skipped: Steps that were left out, since a loss or gradient was not finite.
    """

    def __init__(
        self,
        tracker: Tracker,
        every_steps: int,
        phase: str,
        epoch: int,
        skips_gradients: bool = False,
        phase_number: int = 1,
    ) -> None:
        """Args:
        tracker: Where rows go.
        every_steps: How many steps are logged at once.
        phase: The phase's name.
        epoch: The epoch's number.
        skips_gradients: Whether a step whose gradient is not finite was left out (by the scaler of fp16).
        phase_number: The phase's number, from 1.
        """
        self._tracker = tracker
        self._skips_gradients = skips_gradients
        self.num_skipped = 0
        self._every_steps = every_steps
        self._common: dict[str, int | str] = {"epoch": epoch, "phase": phase, "phase_number": phase_number}
        self._pending: list[_Step] = []
        self._num_images = self._pending_images = 0
        self._start = self._since = time.perf_counter()
        self._loss_sum, self._num_steps = 0.0, 0
        self.latest = ""

    def add(
        self,
        step: int,
        tasks: Sequence[str],
        losses: Sequence[LossRow],
        norm: Tensor,
        lr: Mapping[str, float],
        indices: list[Tensor],
    ) -> None:
        """Records a step.

        Args:
            step: Steps done in the run, this one included.
            tasks: The tasks of which it had labels.
            losses: Of each of its batches.
            norm: The norm of the gradients of all trainable parameters, a scalar.
            lr: The learning rates used, by parameter group.
            indices: For each of its batches the images' places, on the CPU.
        """
        self._pending.append(_Step(step, tuple(tasks), lr, losses, norm, indices))
        self._pending_images += sum(map(len, indices))
        if len(self._pending) >= self._every_steps:
            self.flush()

    def flush(self) -> None:
        """Logs the steps since the last flush; the only place that waits for the device.

        Raises:
            NotFiniteError: A loss or gradient is not finite.
        """
        if not self._pending:
            return
        # Joined only here: a small kernel takes as long as a row of Python.
        values = torch.cat([part for each in self._pending for part in each.row()]).tolist()
        now = time.perf_counter()
        rate, start = self._pending_images / (now - self._since), 0
        rows, latest = list[Row](), dict[str, float]()
        try:
            for each in self._pending:
                row = values[start : start + 2 + len(each.tasks)]
                start += len(row)
                numbers = _numbers(each.tasks, row)
                rates = {f"train/lr/{group}": lr for group, lr in each.lr.items()}
                rest = {"train/lr": max(each.lr.values(), default=0.0), **rates, "perf/images_per_s": rate}
                if each.tasks:
                    rest["train/loss_sum"] = sum(row[1:-1])
                rows.append({"step": each.step, **self._common, **numbers, **rest})
                self._check(numbers, each.step, each.indices)
                if each.tasks:
                    self._loss_sum += row[0]
                    self._num_steps += 1
                    latest = dict(zip(("loss", *each.tasks), row, strict=False))
        finally:
            self._tracker.log_steps(rows)
        if latest:
            self.latest = "  ".join(f"{name} {value:.3f}" for name, value in latest.items())
        self._num_images += self._pending_images
        self._pending, self._pending_images, self._since = [], 0, now

    def _check(self, numbers: Mapping[str, float], step: int, indices: Sequence[Tensor]) -> None:
        """Raises `NotFiniteError`, with a task's loss before what follows from it."""
        wrong = [name for name, value in numbers.items() if not math.isfinite(value)]
        if wrong == [GRAD_NORM] and self._skips_gradients:
            self.num_skipped += 1
        elif wrong:
            raise self._error(wrong, numbers, step, indices)

    def _error(
        self, wrong: Sequence[str], numbers: Mapping[str, float], step: int, indices: Sequence[Tensor]
    ) -> NotFiniteError:
        name = next((each for each in wrong if each.startswith("train/loss/")), wrong[0])
        places = torch.cat(list(indices)).tolist()
        return NotFiniteError(name, numbers[name], step, str(self._common["phase"]), places)

    def what_is_wrong(
        self, step: int, tasks: Sequence[str], losses: Sequence[LossRow], norm: Tensor, indices: list[Tensor]
    ) -> NotFiniteError:
        """The loss or gradient that is NaN or infinite in a step that is left out; waits for the device."""
        row = torch.cat(_Step(step, tuple(tasks), {}, losses, norm, indices).row())
        numbers = _numbers(tasks, row.tolist())
        wrong = [name for name, value in numbers.items() if not math.isfinite(value)]
        return self._error(wrong, numbers, step, indices)

    def skip(self) -> None:
        """Records a step that was left out."""
        self.num_skipped += 1

    def add_row(self, step: int, numbers: Mapping[str, float], shown: Collection[str]) -> None:
        """Logs other numbers of a step that is still to be added, after the steps before it: no step goes back.

        Args:
            step: The step.
            numbers: The numbers.
            shown: Those that the backend shows as well.
        """
        self.flush()
        self._tracker.log({"step": step, **self._common, **numbers}, shown)

    def state_dict(self) -> dict[str, float]:
        """Sums over the epoch so far, all of which is flushed."""
        return {"loss_sum": self._loss_sum, "num_steps": self._num_steps, "num_skipped": self.num_skipped}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restores the sums of an interrupted epoch; time counts from now on."""
        self._loss_sum, self._num_steps = state["loss_sum"], int(state["num_steps"])
        self.num_skipped = int(state["num_skipped"])

    @property
    def mean_loss(self) -> float:
        return self._loss_sum / max(1, self._num_steps)

    @property
    def images_per_s(self) -> float:
        """Training images a second from the epoch's begin to the last flush."""
        return self._num_images / max(1e-9, self._since - self._start)


def _numbers(tasks: Sequence[str], row: Sequence[float]) -> dict[str, float]:
    """A step's numbers by metric; a step of whose tasks none has a label has no loss."""
    losses = {"train/loss": row[0], **{f"train/loss/{task}": row[1 + at] for at, task in enumerate(tasks)}}
    return (losses if tasks else {}) | {GRAD_NORM: row[-1]}
