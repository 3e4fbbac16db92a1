"""The three loops that `mtl bench` times, each as a function that trains for one epoch."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from mtl.data import Batch, training_batches
from mtl.model import MultiTaskModel
from mtl.model.prefix import Prefix
from mtl.model.trunk import Features
from mtl.training.loop import Trainer
from mtl.training.phase import ActivePhase
from mtl.training.setup import RunSetup
from mtl.training.tracking.tracker import Tracker


@contextmanager
def mtl_loop(setup: RunSetup, folder: Path) -> Iterator[tuple[Callable[[], None], list[float]]]:
    """An epoch of the real loop, without the validation and the checkpoint that follow one; the first one enters."""
    trainer = Trainer(setup, folder, Tracker(setup.config.tracking, folder, "bench", {}), quiet=True)
    spent: list[float] = []
    audit: Any = trainer.audit
    for name in ("after_backward", "after_step", "verify"):
        setattr(audit, name, _timed(getattr(audit, name), spent))
    entered: list[ActivePhase] = []
    with ExitStack() as stack:

        def epoch() -> None:
            if not entered:
                entered.append(stack.enter_context(trainer.active(setup.phases[0])))
            trainer.train_epoch(entered[0])
            trainer.audit.verify()

        yield epoch, spent


def _timed(call: Callable[..., None], spent: list[float]) -> Callable[..., None]:
    def timed(**options: bool) -> None:
        started = time.perf_counter()
        call(**options)
        spent.append(time.perf_counter() - started)

    return timed


def naive_loop(setup: RunSetup) -> Callable[[], None]:
    model = copy.deepcopy(setup.model)
    return _plain_loop(setup, model, lambda batch: model(batch.images))


def limit_loop(setup: RunSetup) -> Callable[[], None]:
    phase, model = setup.phases[0], copy.deepcopy(setup.model)
    if not any(name.startswith("trunk.") for name in phase.freeze.plan.names.frozen):
        return _plain_loop(setup, model, lambda batch: model(batch.images))
    _freeze_as_tutorials_do(model, phase.freeze.plan.names.frozen)
    _rest(model)
    batches = [setup.train.batch(each).to(setup.device) for each in torch.split(torch.arange(len(setup.train)), 64)]
    prefix = Prefix.record(model.trunk, model.read, model.prepare(batches[0].images))
    by_batch = [prefix.compute(model.prepare(batch.images)) for batch in batches]
    extracted = [torch.cat(field) for field in zip(*by_batch, strict=True)]

    def outputs(batch: Batch) -> dict[str, Tensor]:
        indices = batch.indices.to(setup.device)
        features: Features = prefix.replay([field.index_select(0, indices) for field in extracted])
        return model.decode(features, batch.size)

    return _plain_loop(setup, model, outputs)


def _plain_loop(
    setup: RunSetup, model: MultiTaskModel, outputs: Callable[[Batch], dict[str, Tensor]]
) -> Callable[[], None]:
    phase = setup.phases[0]
    balance = copy.deepcopy(phase.balance)
    _freeze_as_tutorials_do(model, phase.freeze.plan.names.frozen)
    _rest(model)
    parameters = [p for p in [*model.parameters(), *balance.parameters()] if p.requires_grad]
    optimizer = AdamW(parameters, lr=1e-3, fused=True)
    epochs = 0

    def epoch() -> None:
        nonlocal epochs
        epochs += 1
        for batch in training_batches(setup.train, phase.batch_size, 0, epochs, order=phase.order):
            batch = batch.to(setup.device)
            predicted = outputs(batch)
            losses = torch.stack([task.loss(predicted[name], batch.labels[name]) for name, task in setup.tasks.items()])
            balance(losses).backward()
            optimizer.step()
            optimizer.zero_grad()

    return epoch


def _freeze_as_tutorials_do(model: nn.Module, frozen: Iterable[str]) -> None:
    names = set(frozen)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name not in names


def _rest(model: nn.Module) -> None:
    """Puts modules of frozen parameters in eval mode, since the loops shall all compute the same."""
    for module in model.modules():
        module.__dict__.pop("train", None)
    model.train()
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if own and not any(parameter.requires_grad for parameter in own):
            module.eval()
