"""Loops of other code bases, on the same model and the same batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtl.results.bench.loops import ByHand, Loop
from mtl.results.bench.measure import Maker
from mtl.training.setup import RunSetup


class LikeLibMtl(ByHand):
    """The loop of LibMTL with equal weighting, rewritten after its code.

    Source: LibMTL (Lin and Zhang, JMLR 2023, arXiv 2203.14338), `LibMTL/trainer.py` (`train_singlelevel`, `test`),
    `_record.py`, `loss.py` and `weighting/EW.py` of github.com/median-research-group/LibMTL, commit 4336804. It is no
    proper package: its module of the trainer needs torch_geometric and cvxpy, and `cuda:0`.

    Theirs: losses are written into one tensor, each with an `.item()`; the metrics of training batches are updated
    after every forward; gradients are zeroed, not dropped, before the backward; equal weighting multiplies by ones and
    sums; the weights of every batch are kept; the test measures losses and metrics; then the whole model is saved, as
    theirs is after each best epoch.

    Ours: the model, its frozen part in eval mode (theirs has no freeze), the batches, losses and metrics of the
    tasks, and AdamW. Left out: its printing, `count_improvement`, and everything that only other weightings need.
    """

    def __init__(self, setup: RunSetup) -> None:
        super().__init__(setup)
        self._names = list(setup.labelled)
        self._batch_weight: list[Tensor] = []

    def loop(self, folder: Path) -> Loop:
        def epoch(trained: Callable[[], None]) -> None:
            self._train_epoch()
            trained()
            self._test()
            torch.save(self.model.state_dict(), folder / "libmtl.pt")

        return epoch

    def _train_epoch(self) -> None:
        self._batch_weight.clear()
        meter = _Meter(self._setup)
        for given, labels in self.train():
            losses, outputs = self._forward(meter, given, labels)
            meter.update(outputs, labels)
            self.optimizer.zero_grad(set_to_none=False)
            torch.mul(losses, torch.ones_like(losses)).sum().backward()  # type: ignore[no-untyped-call]
            self._batch_weight.append(torch.ones(len(self._names)))
            self.optimizer.step()
        meter.scores()

    @torch.no_grad()
    def _test(self) -> None:
        meter = _Meter(self._setup)
        self.model.eval()
        for given, labels in self.val():
            _, outputs = self._forward(meter, given, labels)
            meter.update(outputs, labels)
        meter.scores()
        # Theirs puts the whole model in train mode; here, what is frozen rests in every loop.
        self.rest()

    def _forward(self, meter: _Meter, given: Any, labels: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        outputs, each = self.losses(given, labels)
        losses = torch.zeros(len(each), device=self._setup.device)
        for number, loss in enumerate(each):
            losses[number] = loss
            meter.record(self._names[number], loss.item(), len(given))
        return losses, outputs


class _Meter:
    """`_PerformanceMeter`: losses as numbers, and the tasks' metrics."""

    def __init__(self, setup: RunSetup) -> None:
        self._metrics = {name: task.every_metric() for name, task in setup.labelled.items()}
        self._losses: dict[str, list[tuple[float, int]]] = {name: [] for name in self._metrics}

    def record(self, name: str, loss: float, num_images: int) -> None:
        self._losses[name].append((loss, num_images))

    @torch.no_grad()
    def update(self, outputs: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> None:
        for name, metric in self._metrics.items():
            metric.update(outputs[name], labels[name])

    def scores(self) -> dict[str, dict[str, float]]:
        """Metrics and the mean loss, by task."""
        means = {name: sum(a * n for a, n in own) / sum(n for _, n in own) for name, own in self._losses.items()}
        return {name: metric.compute() | {"loss": means[name]} for name, metric in self._metrics.items()}


def _libmtl(setup: RunSetup, folder: Path, _: ExitStack) -> Loop:
    return LikeLibMtl(setup).loop(folder)


def _lightning(setup: RunSetup, folder: Path, stack: ExitStack) -> Loop:
    from mtl.results.bench.lightning_peer import LightningLoop

    return stack.enter_context(LightningLoop(setup, folder))


# What each needs besides mtl: the module and the package of that name.
_NEEDED: Mapping[str, Mapping[str, str]] = {
    "libmtl": {},
    "lightning": {"lightning": "lightning", "finetuning_scheduler": "finetuning-scheduler"},
}
_PEERS: Mapping[str, Maker] = {"libmtl": _libmtl, "lightning": _lightning}


def peers_here() -> tuple[dict[str, Maker], list[str]]:
    """The peers that can be run here, by name; and of each other one, what it lacks."""
    lacking = {
        name: [package for module, package in needed.items() if find_spec(module) is None]
        for name, needed in _NEEDED.items()
    }
    there = {name: _PEERS[name] for name, packages in lacking.items() if not packages}
    return there, [_words(name, packages) for name, packages in lacking.items() if packages]


def _words(name: str, packages: Iterable[str]) -> str:
    return f"{name}: not measured, {' and '.join(packages)} not installed (pip install 'mtl-freeze[peers]')"
