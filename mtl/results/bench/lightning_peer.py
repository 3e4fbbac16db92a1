"""Lightning with FinetuningScheduler, one epoch of `Trainer.fit` at a time."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from threading import Semaphore, Thread
from types import TracebackType
from typing import Any

import lightning.pytorch as pl
import torch
from finetuning_scheduler import FinetuningScheduler, FTSCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from mtl.data import Batch, training_batches, validation_batches
from mtl.results.bench.loops import ByHand
from mtl.training.setup import RunSetup

_LOUD = ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero")


class _EndedError(Exception):
    """The measurement is over."""


class LightningLoop(AbstractContextManager["LightningLoop"]):
    """Epochs of one `Trainer.fit`, which runs in a thread of its own and waits before each of them.

    As its documentation shows: a schedule whose first phase names the trainable parameters (all others stay frozen),
    `FTSCheckpoint` with the best and the last epoch, losses and metrics by `self.log`, a CSV logger. Left out: progress
    bar, summary of the model, and the sanity check of the validation.
    """

    def __init__(self, setup: RunSetup, folder: Path) -> None:
        self._turns = turns = _Turns()
        self._fit = lambda: _fit(setup, folder, turns)
        self._thread = Thread(target=self._run, daemon=True)
        self._error: BaseException | None = None
        self._warnings = warnings.catch_warnings()

    def __enter__(self) -> LightningLoop:
        self._warnings.__enter__()
        # It warns of few batches, of modules in eval mode, and of its own use of torch.
        warnings.filterwarnings("ignore", module=r"(lightning|finetuning_scheduler)\b")
        return self

    def __call__(self, trained: Callable[[], None]) -> None:
        """One epoch; the first call begins the fit."""
        self._turns.trained = trained
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._turns.go.release()
        self._turns.done.acquire()
        if self._error is not None:
            raise self._error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread.is_alive():
            self._turns.is_over = True
            self._turns.go.release()
            self._thread.join()
        self._warnings.__exit__(kind, error, trace)

    def _run(self) -> None:
        try:
            self._fit()  # type: ignore[no-untyped-call]
        except _EndedError:
            pass
        except BaseException as error:  # noqa: BLE001  raised where the epoch was asked for
            self._error = error
        finally:
            self._turns.done.release()


class _Turns(pl.Callback):
    """Waits before each epoch but the first, and says when the training part is over.

    Attributes:
        go: Released for an epoch.
        done: Released when one is over, callbacks and checkpoint included.
        trained: Called after the training part.
        is_over: Whether the fit ends in place of its next epoch.
    """

    def __init__(self) -> None:
        self.go, self.done = Semaphore(0), Semaphore(0)
        self.trained: Callable[[], None] = lambda: None
        self.is_over = False
        self._has_begun = False

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        del trainer, pl_module
        if self._has_begun:
            self.done.release()
            self.go.acquire()
        self._has_begun = True
        if self.is_over:
            raise _EndedError

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        del trainer, pl_module
        self.trained()


class _Module(pl.LightningModule):
    def __init__(self, by_hand: ByHand, setup: RunSetup) -> None:
        super().__init__()
        # FinetuningScheduler freezes and thaws what this module holds.
        self.net = by_hand.model
        self._by_hand, self._setup = by_hand, setup
        self._measured: dict[str, Any] = {}

    def training_step(self, batch: Batch, _: int) -> Tensor:
        loss = torch.stack(self._by_hand.losses(batch.images, batch.labels)[1]).mean()
        self.log("train/loss", loss, batch_size=len(batch))
        return loss

    def on_validation_epoch_start(self) -> None:
        self._measured = {name: task.every_metric() for name, task in self._setup.labelled.items()}

    def validation_step(self, batch: Batch, _: int) -> None:
        outputs, losses = self._by_hand.losses(batch.images, batch.labels)
        self.log("val/loss", torch.stack(losses).mean(), batch_size=len(batch))
        for name, metric in self._measured.items():
            metric.update(outputs[name], batch.labels[name])

    def on_validation_epoch_end(self) -> None:
        scores = {name: metric.compute() for name, metric in self._measured.items()}
        self.log_dict({f"val/{task}/{name}": value for task, own in scores.items() for name, value in own.items()})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self._by_hand.optimizer


class _Epochs:
    """The batches of the next epoch each time: the same ones for every loop."""

    def __init__(self, length: int, make: Callable[[int], Iterator[Batch]]) -> None:
        self._length, self._make, self._epoch = length, make, 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        # Lightning asks for an iterator that it draws nothing from, to see whether there is one: that is no epoch.
        self._epoch += 1
        yield from self._make(self._epoch)


def _fit(setup: RunSetup, folder: Path, turns: _Turns) -> None:
    phase, by_hand = setup.phases[0], ByHand(setup)
    module = _Module(by_hand, setup)
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    train = _Epochs(
        phase.steps_per_epoch,
        lambda epoch: training_batches(setup.train, phase.batch_size, 0, epoch, order=phase.order),
    )
    val = _Epochs(-(-len(setup.val) // phase.batch_size), lambda _: validation_batches(setup.val, phase.batch_size))
    most = phase.length.epochs
    schedule = {0: {"params": names, "max_transition_epoch": most}}
    trainer(
        folder,
        [
            turns,
            FinetuningScheduler(ft_schedule=schedule, epoch_transitions_only=True, restore_best=False),
            FTSCheckpoint(dirpath=folder / "lightning", monitor="val/loss", save_last=True),
        ],
        max_epochs=most,
        accelerator=setup.device.type,
        logger=CSVLogger(folder / "csv"),
    ).fit(module, train, val)


def trainer(folder: Path, callbacks: list[pl.Callback], **options: Any) -> pl.Trainer:
    """A trainer of Lightning that shows nothing.

    Args:
        folder: Where it writes.
        callbacks: Its callbacks.
        options: Further options of it.
    """
    for name in _LOUD:
        logging.getLogger(name).setLevel(logging.ERROR)
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return pl.Trainer(default_root_dir=folder, callbacks=callbacks, devices=1, **quiet, **options)
