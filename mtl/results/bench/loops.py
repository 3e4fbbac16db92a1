"""The loops that `mtl bench` times, each as a function that goes through one whole epoch."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from mtl.data import Split, training_batches, validation_batches
from mtl.model.prefix import Prefix
from mtl.model.trunk import Features, features_from
from mtl.phases.metrics import RunMetrics
from mtl.training.loop import Trainer
from mtl.training.phase import ActivePhase
from mtl.training.setup import RunSetup
from mtl.training.tracking.tracker import Tracker

# One epoch. Its argument is called once: when the training part is over, before validation and checkpoint.
Loop = Callable[[Callable[[], None]], None]
# What a model, or what is left of it, reads of a batch; and the labels by task.
Given = tuple[Any, Mapping[str, Tensor]]


@dataclass
class MtlLoop:
    """The real loop.

    Attributes:
        epoch: Goes through an epoch; the first call enters the phase.
        wait: Returns once the last checkpoint is on disk; it is written while the next epoch's steps run.
        audit_s: Receives the seconds of every call of the audit.
        message: Where the run is tracked.
    """

    epoch: Loop
    wait: Callable[[], None]
    audit_s: list[float]
    message: str


@contextmanager
def mtl_loop(setup: RunSetup) -> Iterator[MtlLoop]:
    """As `mtl train` runs it, in a run directory of its own, but for the progress bar."""
    config, run_dir = setup.config, setup.config.run_dir
    run_dir.mkdir(parents=True)
    resolved = config.model_dump(mode="json", exclude_none=True)
    directions = RunMetrics(config, setup.tasks).directions
    tracker = Tracker(config.tracking, run_dir, config.name, resolved, directions=directions)
    trainer = Trainer(setup, run_dir, tracker, quiet=True)
    spent: list[float] = []
    audit: Any = trainer.audit
    for name in ("after_backward", "after_step", "verify", "check_signs"):
        setattr(audit, name, _timed(getattr(audit, name), spent))
    trainer.state.start_clock()
    trainer.log.dashboard.begin(0)
    entered: list[ActivePhase] = []
    with ExitStack() as stack:
        stack.callback(tracker.finish, {}, failed=False)
        stack.enter_context(trainer.checkpoints.written())

        def epoch(trained: Callable[[], None]) -> None:
            if not entered:
                entered.append(stack.enter_context(trainer.active(setup.phases[0])))
            trainer.train_epoch(entered[0])
            trained()
            trainer.finish_epoch(entered[0])

        yield MtlLoop(epoch, trainer.checkpoints.wait, spent, tracker.message if tracker.is_less else "")


def _timed(call: Callable[..., None], spent: list[float]) -> Callable[..., None]:
    def timed(**options: bool) -> None:
        started = time.perf_counter()
        call(**options)
        spent.append(time.perf_counter() - started)

    return timed


# --- by hand


class ByHand:
    """A loop by hand on images.

    Attributes:
        model: A copy of the run's model, frozen as tutorials do.
        optimizer: AdamW on the trainable parameters.
    """

    def __init__(self, setup: RunSetup) -> None:
        self._setup = setup
        self._epoch = 0
        self.model = copy.deepcopy(setup.model)
        frozen = set(setup.phases[0].freeze.plan.names.frozen)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad = name not in frozen
        self.rest()
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer: Optimizer = AdamW(trainable, lr=1e-3, fused=True)

    def rest(self) -> None:
        """Train mode, but eval mode of modules of frozen parameters, since the loops shall all compute the same."""
        self.model.train()
        for module in self.model.modules():
            own = list(module.parameters(recurse=False))
            if own and not any(parameter.requires_grad for parameter in own):
                module.eval()

    def train(self) -> Iterable[Given]:
        """The batches of the next epoch: the same ones for every loop, made ahead of the steps by a thread."""
        self._epoch += 1
        phase, split = self._setup.phases[0], self._setup.train
        for batch in training_batches(split, phase.batch_size, 0, self._epoch, order=phase.order):
            moved = batch.to(self._setup.device)
            yield moved.images, moved.labels

    def val(self) -> Iterable[Given]:
        """The batches of the validation split."""
        for batch in validation_batches(self._setup.val, self._setup.phases[0].batch_size):
            moved = batch.to(self._setup.device)
            yield moved.images, moved.labels

    def outputs(self, given: Any) -> dict[str, Tensor]:
        """The outputs of all heads."""
        outputs: dict[str, Tensor] = self.model(given)
        return outputs

    def losses(self, given: Any, labels: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Outputs and losses of all tasks."""
        outputs = self.outputs(given)
        return outputs, [task.loss(outputs[name], labels[name]) for name, task in self._setup.tasks.items()]

    @torch.no_grad()
    def validate(self) -> dict[str, dict[str, float]]:
        """Metrics by task."""
        metrics = {name: task.every_metric() for name, task in self._setup.labelled.items()}
        self.model.eval()
        for given, labels in self.val():
            outputs = self.outputs(given)
            for name, metric in metrics.items():
                metric.update(outputs[name], labels[name])
        self.rest()
        return {name: metric.compute() for name, metric in metrics.items()}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the model that are saved."""
        return self.model.state_dict()

    def loop(self, folder: Path) -> Loop:
        """Train, validate, `torch.save` of model and optimizer."""

        def epoch(trained: Callable[[], None]) -> None:
            for given, labels in self.train():
                _, losses = self.losses(given, labels)
                torch.stack(losses).mean().backward()  # type: ignore[no-untyped-call]
                self.optimizer.step()
                self.optimizer.zero_grad()
            trained()
            self.validate()
            content = {"model": self.tensors(), "optimizer": self.optimizer.state_dict()}
            torch.save(content, folder / f"{type(self).__name__}.pt")

        return epoch


class OnTrainable(ByHand):
    """The same; only trainable parameters are saved."""

    def tensors(self) -> dict[str, Tensor]:
        own = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        return {name: tensor for name, tensor in self.model.state_dict().items() if name in own}


class OnExtracted(OnTrainable):
    """A loop by hand on what was extracted: features, or activations at the boundary of the frozen part."""

    def __init__(self, setup: RunSetup) -> None:
        super().__init__(setup)
        first = setup.train.batch(torch.arange(min(64, len(setup.train)))).to(setup.device)
        if self.model.trunk_is_frozen:
            kinds = self.model.encode(first.images).kinds
            self._compute: Callable[[Tensor], Sequence[Tensor]] = lambda images: self.model.encode(images).tensors()
            self._features: Callable[[Sequence[Tensor]], Features] = lambda rows: features_from(rows, kinds)
        else:
            prefix = Prefix.record(self.model.trunk, self.model.read, self.model.prepare(first.images))
            self._compute = lambda images: prefix.compute(self.model.prepare(images))
            self._features = prefix.replay
        self._train, self._val = self._extract(setup.train), self._extract(setup.val)

    def train(self) -> Iterable[Given]:
        self._epoch += 1
        phase = self._setup.phases[0]
        kept, labels = self._train
        for indices in phase.order.batches(phase.batch_size, 0, self._epoch):
            rows = indices.to(self._setup.device)
            yield (
                [each.index_select(0, rows) for each in kept],
                {name: label.index_select(0, rows) for name, label in labels.items()},
            )

    def val(self) -> Iterable[Given]:
        """One batch where only heads run; the rest of a trunk takes batches as in training."""
        (kept, labels), num = self._val, len(self._setup.val)
        size = num if self.model.trunk_is_frozen else self._setup.phases[0].batch_size
        for start in range(0, num, size):
            part = slice(start, start + size)
            yield [each[part] for each in kept], {name: label[part] for name, label in labels.items()}

    def outputs(self, given: Any) -> dict[str, Tensor]:
        return self.model.decode(self._features(given), self._setup.train.size)

    @torch.no_grad()
    def _extract(self, split: Split) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The kept features of all images of a split, and their labels by task, on the device."""
        batches = [split.batch(part).to(self._setup.device) for part in torch.split(torch.arange(len(split)), 64)]
        fields = zip(*(self._compute(batch.images) for batch in batches), strict=True)
        labels = {name: torch.cat([batch.labels[name] for batch in batches]) for name in batches[0].labels}
        return [torch.cat(field) for field in fields], labels


def naive_loop(setup: RunSetup, folder: Path) -> Loop:
    """The loop of every tutorial: `requires_grad = False`, and the whole model runs and is saved."""
    return ByHand(setup).loop(folder)


def limit_loop(setup: RunSetup, folder: Path) -> Loop:
    """The limit: a loop written by hand for this one phase."""
    can_extract = any(name.startswith("trunk.") for name in setup.phases[0].freeze.plan.names.frozen)
    return (OnExtracted if can_extract else OnTrainable)(setup).loop(folder)
