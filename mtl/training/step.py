"""The forward of a step: from a batch to the losses of the tasks, and to the one number that is minimised."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from mtl.data import Batch
from mtl.distributed.world import ALONE, World
from mtl.model.trunk import Features, features_from
from mtl.optim.balance.gradient_balance import Shared, StepGradients
from mtl.phases.resolve import Phase
from mtl.runtime.rng import torch_seeded
from mtl.runtime.tensors import is_sharded
from mtl.training.features import FeatureSource
from mtl.training.setup import RunSetup
from mtl.training.step_sync import StepTasks


class StepLosses:
    """Features -> heads -> task losses -> balance. One for each run."""

    def __init__(
        self,
        setup: RunSetup,
        features: FeatureSource,
        autocast: torch.autocast,
        scaler: GradScaler,
        world: World = ALONE,
    ) -> None:
        self._setup = setup
        self._features = features
        self._decode = setup.model.decode_joined if setup.config.join_heads else setup.model.decode
        # Entering a disabled autocast costs as much time as a small layer, so none is entered.
        self._autocast: AbstractContextManager[Any] = autocast if autocast._enabled else nullcontext()
        self._scaler = scaler
        self._world = world
        self._are_sharded = any(is_sharded(parameter) for parameter in setup.model.parameters())
        # Of the batches of an accumulated step so far.
        self._gradients: StepGradients | None = None

    def __call__(
        self,
        batch: Batch,
        phase: Phase,
        tasks: StepTasks,
        share: Tensor | None = None,
        step: int = 0,
        silent: Sequence[nn.Parameter] = (),
        is_last: bool = True,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Args:
            batch: This process's part of a batch.
            phase: The active phase.
            tasks: Those of its tasks of which the step has labels.
            share: The weight of its mean losses among those of the whole step, "t"; 1 each if not given.
            step: Steps done in the run.
            silent: Parameters that these tasks do not reach, and that get a gradient of zeros.
            is_last: Whether it is the last batch of the step: its loss has the gradients that a method has made of
                those of all batches, and the losses before have none.

        Returns:
            The loss to minimise, a scalar; the losses of the step's tasks over all processes, "t"; and this process's
            own, as separate scalars, whose graphs part at the heads.
        """
        zero = torch.stack([(parameter * 0).sum() for parameter in silent]).sum() if silent else None
        if not tasks.names:
            total = torch.zeros((), device=self._setup.device, requires_grad=True) if zero is None else zero
            return total, total.detach().new_empty(0), []
        features = leaves = None
        if phase.balances_gradients and phase.balance.on != "parameters":
            with self._autocast:
                features = self._features(batch, tasks.names)
            leaves = _detached(features)
        each = self.each_loss(batch, tasks.names, leaves)
        losses = self._world.global_losses(_shared(each, share))
        # A method that draws weights draws the same ones with any number of processes.
        seed = self._setup.config.seed * 1_000_003 + step
        with torch_seeded(seed, self._setup.device) if phase.balance.may_draw else nullcontext():
            if phase.balances_gradients:
                losses = losses.detach()
                shared = self._shared_by_tasks(phase, features, leaves)
                total = self._by_gradients(phase, tasks, each, share, losses, shared, is_last)
                each = shared.rejoined(each)
            else:
                total = phase.balance(losses, tasks.subset)
        return total if zero is None else total + zero, losses, each

    def each_loss(self, batch: Batch, tasks: Sequence[str], features: Features | None = None) -> list[Tensor]:
        """The losses of some tasks on a batch, scalars, float32; from its features, if these are known already."""
        with self._autocast:
            known = self._features(batch, tasks) if features is None else features
            outputs = self._decode(known, batch.size, tasks)
        return [self._setup.tasks[name].loss(outputs[name], batch.labels[name]) for name in tasks]

    @torch.no_grad()
    def without_graph(self, batch: Batch, tasks: StepTasks, share: Tensor | None) -> Tensor:
        """The losses of the step's tasks over all processes, "t"."""
        return self._world.mean(_shared(self.each_loss(batch, tasks.names), share))

    def _by_gradients(
        self,
        phase: Phase,
        tasks: StepTasks,
        each: Sequence[Tensor],
        share: Tensor | None,
        losses: Tensor,
        shared: Shared,
        is_last: bool,
    ) -> Tensor:
        """The loss whose gradients a method has balanced; `losses` are those over all processes."""
        method = phase.balance.by_gradients
        assert method is not None
        gradients = self._gradients or StepGradients(self._world, self._scaler)
        # Not taken from the stacked losses, through which each would go back through the heads of all.
        own = list(each) if share is None else [loss * part for loss, part in zip(each, share.to(each[0]), strict=True)]
        total: Tensor = phase.balance(losses, tasks.subset)
        gradients.add(own, losses, shared, method.num_batches > 1)
        self._gradients = None if is_last else gradients
        if not is_last:
            return total.detach().requires_grad_()
        return gradients.loss(total, method, shared, tasks.subset)

    def _shared_by_tasks(self, phase: Phase, features: Features | None, leaves: Features | None) -> Shared:
        """The shared tensors of the phase's tasks."""
        root = self._setup.root
        trunk = {n: p for n, p in self._setup.model.trunk.named_parameters() if p.requires_grad}
        of_trunk = {id(parameter) for parameter in trunk.values()}
        others = [p for p in root.parameters() if p.requires_grad and id(p) not in of_trunk]
        if features is None or leaves is None:
            parameters = list(trunk.values())
            return Shared(parameters=parameters, others=others, names=list(trunk), are_sharded=self._are_sharded)
        return Shared(
            features=[each for each in features.tensors() if each.requires_grad],
            leaves=[each for each in leaves.tensors() if each.requires_grad],
            layer=[root.get_parameter(name) for name in phase.looks_at],
            per_sample=phase.balance.per_sample,
            trunk=list(trunk.values()),
            others=others,
            names=phase.looks_at,
            are_sharded=self._are_sharded,
        )


def _detached(features: Features) -> Features:
    """The same features, as leaves of the graph of the heads."""
    tensors = [each.detach().requires_grad_(each.requires_grad) for each in features.tensors()]
    return features_from(tensors, features.kinds)


def _shared(each: Sequence[Tensor], share: Tensor | None) -> Tensor:
    losses = torch.stack(list(each))
    return losses if share is None else losses * share.to(losses)
