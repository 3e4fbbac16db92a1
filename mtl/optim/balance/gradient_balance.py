"""Losses balanced by their gradients on shared parameters: a backward a task, one gradient, a loss that has it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.autograd.function import once_differentiable

from mtl.distributed.world import World
from mtl.optim.task_gradients import loss_gradients


def balance_gradients(
    value: Tensor,
    losses: Sequence[Tensor],
    shared: Sequence[nn.Parameter],
    others: Sequence[nn.Parameter],
    combine: Callable[[Tensor], Tensor],
    world: World,
    scaler: GradScaler,
) -> Tensor:
    """A loss whose backward gives shared parameters what is made of the tasks' gradients, and others their plain sum.

    Source: TorchJD's `mtl_backward` and `jac_to_grad`. Heads are not weighed: with weight 0 a task's head would not
    train, and with a negative weight it would learn to be wrong.

    The one backward per task runs here. The returned loss's own backward costs next to nothing: it passes the known
    gradients to the parameters and their hooks, such as DDP's. Memory: one gradient of the shared parameters per task,
    and a few more. The graphs are kept.

    Args:
        value: The value of the loss, a scalar.
        losses: This rank's part of the tasks' losses, each a scalar with its own graph, independent of the others; the
            same tasks on every rank. The full losses are the means over ranks.
        shared: Trainable parameters that the tasks share, not empty: their gradients are averaged over ranks, once a
            task, and weighed.
        others: All other trainable parameters, usually each of one task; the backward of the loss, or DDP, averages
            their gradients.
        combine: Maps the tasks' gradients over all ranks, "t p", to the one that the shared parameters get, "p".
        world: The ranks.
        scaler: The gradient scaler of fp16, without which small gradients would vanish; does nothing if not enabled.

    Returns:
        The loss, a scalar. Where a task's gradient is not finite, the shared parameters' gradient is not either.
    """
    parameters = [*shared, *others]
    rows = shared[0].new_empty(len(losses), sum(each.numel() for each in shared))
    is_reached = [False] * len(shared)
    sums: list[Tensor | None] = [None] * len(others)
    for row, own_loss in zip(rows, losses, strict=True):
        found = loss_gradients(scaler.scale(own_loss), parameters)
        mine, own = found[: len(shared)], found[len(shared) :]
        row.copy_(world.mean(_as_row(mine, shared)))
        is_reached = [before or now is not None for before, now in zip(is_reached, mine, strict=True)]
        sums = [_sum(before, now) for before, now in zip(sums, own, strict=True)]
    if scaler.is_enabled():
        scale = scaler.scale(torch.ones((), device=rows.device))
        rows /= scale
        sums = [each if each is None else each / scale for each in sums]
    total = torch.split(combine(rows), [each.numel() for each in shared])
    known = [_like(each, part) if so else None for each, part, so in zip(shared, total, is_reached, strict=True)]
    pairs = [(p, gradient) for p, gradient in zip(parameters, [*known, *sums], strict=True) if gradient is not None]
    loss_of: Any = _KnownGradients.apply
    loss: Tensor = loss_of(value.detach(), [gradient for _, gradient in pairs], *(p for p, _ in pairs))
    return loss


def _as_row(gradients: Sequence[Tensor | None], parameters: Sequence[nn.Parameter]) -> Tensor:
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).detach().reshape(-1) for g, p in pairs])


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other


def _like(parameter: nn.Parameter, flat: Tensor) -> Tensor:
    """In the parameter's layout, as DDP expects of a gradient."""
    return torch.empty_like(parameter).copy_(flat.view(parameter.shape))


class _KnownGradients(torch.autograd.Function):
    """A scalar whose gradients are given."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *_: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> Any:
        # The loss may stay alive for a while: release the gradients, which are in the parameters' `.grad` now.
        gradients, ctx.gradients = ctx.gradients, None
        return (None, None, *(factor * each for each in gradients))
