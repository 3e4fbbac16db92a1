"""Losses balanced by their gradients: a backward a task, one gradient, and a loss that has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.autograd.function import once_differentiable

from mtl.distributed.world import World
from mtl.optim.balance.gradient_method import GradientMethod, TaskGradients
from mtl.optim.balance.row_shards import RowShards
from mtl.optim.balance.subset import Subset
from mtl.optim.task_gradients import loss_gradients, sharded_gradients
from mtl.runtime.fingerprint import fingerprint_of_json
from mtl.runtime.tensors import is_sharded, local, sharded_as


@dataclass
class Shared:
    """What the tasks share, and where a method looks.

    Attributes:
        parameters: Trainable parameters whose gradients are balanced, not empty; none if those of features are.
        features: The trunk's features of a batch, tensors inside the graph.
        leaves: The same, detached, of which the heads have made the losses: a level of a pyramid is made of the one
            below, through which a gradient would count twice.
        layer: Parameters whose gradients are compared, in place of those of the features.
        per_sample: Whether gradients of features are compared image by image, or summed over images first. Image by
            image they bound those of the parameters, of which they are no more: with J the trunk's Jacobian and z_i the
            gradients of the features, |J^T sum w_i z_i| <= |J| |sum w_i z_i| for any weights, which is why MGDA-UB
            (Sener and Koltun, arXiv 1810.04650, equation 4) may minimise the latter. Summed they bound nothing.
        trunk: All trainable parameters of the trunk, if features or a layer are compared.
        others: All trainable parameters that get the gradients of the losses themselves, usually each of one task.
        names: The names of the parameters whose gradients are compared; of features, none.
        are_sharded: Whether the model's parameters are sharded over the ranks (FSDP).
    """

    parameters: Sequence[nn.Parameter] = ()
    features: Sequence[Tensor] = ()
    leaves: Sequence[Tensor] = ()
    layer: Sequence[nn.Parameter] = ()
    per_sample: bool = False
    trunk: Sequence[nn.Parameter] = ()
    others: Sequence[nn.Parameter] = ()
    names: Sequence[str] = ()
    are_sharded: bool = False

    @property
    def rows_of(self) -> str:
        """Identifies what the rows are gradients of: a digest of the parameters' names, or `features`."""
        if self.features and not self.layer:
            return "features"
        return fingerprint_of_json([*self.names]) if self.names else ""

    @property
    def balanced(self) -> list[Tensor]:
        """The tensors that get the gradient which the method makes."""
        return [*self.parameters, *self.features]

    def rejoined(self, losses: Sequence[Tensor]) -> list[Tensor]:
        """Losses that were made of leaves, as if of the features: their graphs go on to the trunk.

        Nothing is computed unless a gradient is asked for. Their backward keeps the graphs.
        """
        loss_of: Any = _Rejoined.apply
        # In lists: a tensor among the inputs would have its own backward called.
        return [loss_of([loss], self.leaves, *self.features) for loss in losses] if self.leaves else [*losses]

    def shards(self, world: World) -> RowShards | None:
        """How the rows that a method sees are split over the ranks, if they are."""
        compared = self.layer or self.parameters
        return RowShards(world, compared) if self.are_sharded and compared else None


@dataclass
class StepGradients:
    """The tasks' gradients in a step, added batch by batch, and what a method makes of them.

    Source: TorchJD's `mtl_backward` and `jac_to_grad`. Heads get the gradients of their own losses unless the method
    weighs them too: with weight 0 a task's head would not train, and with a negative one it would learn to be wrong.

    One backward per task runs in `add`: to the parameters that the tasks share; with features, only to these, and the
    trunk has one backward, that of the returned loss. That loss passes known gradients to tensors and their hooks, such
    as DDP's. Memory: one gradient of what is shared for each task, and a few more; for each task and batch, if the
    method compares batches. The graphs are kept. Where parameters are sharded (FSDP), so are all these gradients; the
    parameters are gathered for the backward of each task, which for a layer goes through the whole trunk.

    Attributes:
        world: The ranks.
        scaler: The gradient scaler of fp16, without which small gradients would vanish; does nothing if not enabled.
    """

    world: World
    scaler: GradScaler
    _rows: list[Tensor] = field(default_factory=list)
    _full: Tensor | None = None
    _losses: list[Tensor] = field(default_factory=list)
    _is_reached: list[bool] = field(default_factory=list)
    _others: list[list[Tensor | None]] = field(default_factory=list)

    def add(self, losses: Sequence[Tensor], values: Tensor, shared: Shared, keeps_batches: bool = False) -> None:
        """Adds the gradients of a batch.

        Args:
            losses: This rank's part of the tasks' losses, each a scalar with its own graph, independent of the others;
                the same tasks on every rank. The full losses are the means over ranks.
            values: The full losses, "t", without a graph.
            shared: What the tasks share. Gradients of parameters are averaged over ranks, once a task.
            keeps_batches: Whether the rows of each batch are needed apart.
        """
        balanced, seen = shared.balanced, list[Tensor]()
        reached = [False] * len(balanced)
        # A row for each task; all written once.
        rows = _new_rows(len(losses), balanced)
        scale = self.scaler.scale(torch.ones((), device=values.device)) if self.scaler.is_enabled() else None
        others: list[list[Tensor | None]] = []
        for row, loss in zip(rows, losses, strict=True):
            inputs = [*shared.parameters, *shared.leaves, *shared.others]
            scaled = self.scaler.scale(loss)
            found = sharded_gradients([scaled], inputs) if shared.are_sharded else list(loss_gradients(scaled, inputs))
            if scale is not None:
                found = [each if each is None else each / scale for each in found]
            mine, own = found[: len(balanced)], found[len(balanced) :]
            reached = [before or now is not None for before, now in zip(reached, mine, strict=True)]
            others.append(own)
            _fill_row(row, mine, balanced)
            if shared.parameters and not (self.world.is_alone or shared.are_sharded):
                row.copy_(self.world.mean(row))
            elif shared.layer:
                of_layer = _row_of_layer(mine, shared)
                seen.append(of_layer if shared.are_sharded else self.world.mean(of_layer))
            elif shared.features and not shared.per_sample:
                seen.append(self.world.mean(_summed(mine, balanced)))
        self._losses.append(values)
        self._is_reached = [a or b for a, b in zip(self._is_reached or reached, reached, strict=True)]
        self._others = [_sums(*both) for both in zip(self._others, others, strict=True)] if self._others else others
        if seen:
            self._full, rows = rows, torch.stack(seen)
        if self._rows and not keeps_batches:
            self._rows[0] += rows
        else:
            self._rows.append(rows)

    def loss(self, value: Tensor, method: GradientMethod, shared: Shared, subset: Subset | None = None) -> Tensor:
        """A loss whose backward gives what is shared the gradient that the method makes, and the others their own.

        Args:
            value: The value of the loss, a scalar.
            method: Makes one gradient of those of the tasks.
            shared: As for the last `add`.
            subset: The tasks whose gradients they are, if not all have labels.

        Returns:
            The loss, a scalar: as many times the step's as it has batches, whose losses are averaged. Where a task's
            gradient is not finite, that of what is shared is not either.

        Raises:
            SettingError: The method cannot combine so few tasks.
        """
        num = len(self._losses)
        rows = self._rows[0] if len(self._rows) == 1 else torch.stack(self._rows).sum(dim=0)
        batches = tuple(self._rows) if len(self._rows) > 1 else ()
        if num > 1:
            rows = rows / num
        losses = self._losses[0] if num == 1 else torch.stack(self._losses).mean(dim=0)
        gradients = TaskGradients(rows, losses, batches, subset, shared.rows_of, shared.shards(self.world))
        combined = method.combine(gradients)
        total = combined.of(rows if self._full is None else self._full)
        if num > 1:
            total = total * num
        parts = torch.split(total, _sizes(shared.balanced))
        known = [
            _like(each, part) if is_reached else None
            for each, part, is_reached in zip(shared.balanced, parts, self._is_reached, strict=True)
        ]
        weights = None if combined.head_weights is None else combined.head_weights.to(rows)
        own: list[Tensor | None] = [None] * len(shared.others)
        for place, found in enumerate(self._others):
            own = _sums(own, found if weights is None else [g if g is None else g * weights[place] for g in found])
        tensors = [*shared.balanced, *shared.others]
        pairs = [(each, g) for each, g in zip(tensors, [*known, *own], strict=True) if g is not None]
        loss_of: Any = _KnownGradients.apply
        loss: Tensor = loss_of(value.detach(), [gradient for _, gradient in pairs], *(each for each, _ in pairs))
        return loss


def _new_rows(num: int, tensors: Sequence[Tensor]) -> Tensor:
    """Room for rows with an entry for each element, float32 or wider."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return local(tensors[0]).new_empty(num, sum(_sizes(tensors)), dtype=dtype)


def _sizes(tensors: Sequence[Tensor]) -> list[int]:
    """How many entries each has here: of a sharded one, those of this rank."""
    return [local(each).numel() for each in tensors]


def _fill_row(row: Tensor, gradients: Sequence[Tensor | None], tensors: Sequence[Tensor]) -> Tensor:
    for part, gradient in zip(torch.split(row, _sizes(tensors)), gradients, strict=True):
        if gradient is None:
            part.zero_()
        else:
            part.copy_(gradient.detach().reshape(-1))
    return row


def _row_of_layer(gradients: Sequence[Tensor | None], shared: Shared) -> Tensor:
    """The gradient of a layer's parameters, from those of the features."""
    known = [(f, g) for f, g in zip(shared.features, gradients, strict=True) if g is not None]
    features, given = [f for f, _ in known], [g for _, g in known]
    found: Sequence[Tensor | None]
    if shared.are_sharded:
        by_parameter = dict(zip(shared.trunk, sharded_gradients(features, shared.trunk, given), strict=True))
        found = [by_parameter[parameter] for parameter in shared.layer]
    else:
        found = torch.autograd.grad(features, shared.layer, given, retain_graph=True, allow_unused=True)
    return _fill_row(_new_rows(1, shared.layer)[0], found, shared.layer)


def _summed(gradients: Sequence[Tensor | None], features: Sequence[Tensor]) -> Tensor:
    """The gradients of features, "b ..." each, summed over images."""
    pairs = zip(gradients, features, strict=True)
    known = [torch.zeros_like(f) if g is None else g.detach() for g, f in pairs]
    return torch.cat([each.float().sum(dim=0).reshape(-1) for each in known])


def _sums(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [_sum(before, now) for before, now in zip(one, other, strict=True)]


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other


def _like(tensor: Tensor, flat: Tensor) -> Tensor:
    """In the tensor's layout, as DDP expects of a gradient; of features in half precision in the row's type."""
    here = local(tensor.detach())
    return torch.empty_like(here, dtype=flat.dtype).copy_(flat.view(here.shape))


class _Rejoined(torch.autograd.Function):
    """A loss whose gradients on the features are those on the leaves."""

    @staticmethod
    def forward(ctx: Any, losses: list[Tensor], leaves: Sequence[Tensor], *_: Tensor) -> Tensor:
        ctx.losses, ctx.leaves = losses, leaves
        return losses[0].detach().clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> Any:
        found = torch.autograd.grad(ctx.losses, ctx.leaves, [factor], retain_graph=True, allow_unused=True)
        return (None, None, *found)


class _KnownGradients(torch.autograd.Function):
    """A scalar whose gradients are given; of sharded parameters those of this rank's shards."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.gradients, ctx.dtypes = gradients, [each.dtype for each in tensors]
        ctx.sharded = [each if is_sharded(each) else None for each in tensors]
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> Any:
        # The loss may stay alive for a while: release the gradients, which are in the parameters' `.grad` now.
        gradients, ctx.gradients = ctx.gradients, None
        # Scaled before it is rounded to half precision, in which it might vanish.
        scaled = ((factor * each).to(dtype) for each, dtype in zip(gradients, ctx.dtypes, strict=True))
        pairs = zip(scaled, ctx.sharded, strict=True)
        return (None, None, *(each if model is None else sharded_as(model, each) for each, model in pairs))
