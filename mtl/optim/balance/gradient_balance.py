"""Losses balanced by their gradients on what they share: one backward a task, weights, and a loss made of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.autograd.function import once_differentiable

from mtl.distributed.world import World
from mtl.optim.task_gradients import inner_products, task_gradients


def balance_gradients(
    value: Tensor,
    losses: Sequence[Tensor],
    shared: Sequence[nn.Parameter],
    others: Sequence[nn.Parameter],
    weigh: Callable[[Tensor], Tensor],
    world: World,
    scaler: GradScaler,
) -> Tensor:
    """A loss whose backward gives what is shared the weighted sum of the tasks' gradients, and the rest the plain sum.

    That is TorchJD's `mtl_backward` and `jac_to_grad`. Heads are not weighed: a task of weight 0 would not train its
    own, and one of negative weight would train it to be wrong.

    There is one backward for each task, here, and next to none when the loss is called to its own: it knows the
    gradients, and hands them to whatever hooks the parameters have, such as those of DDP. While it is made, there are
    as many gradients of what is shared as there are tasks, and a few more. The graphs stay as they are.

    Args:
        value: What the loss is as a number, a scalar.
        losses: This process's part of the tasks' losses, each a scalar with its graph, none made of another's; of the
            same tasks in every process. The losses are the means over the processes.
        shared: What they share and trains, not empty: its gradients are averaged over the processes, once a task, and
            weighed.
        others: What else trains, each of one task as a rule; the loss's backward averages those gradients, or DDP.
        weigh: From the inner products of the tasks' gradients over all processes, "t t", float64, to weights, "t".
        world: The processes.
        scaler: Of fp16, in which gradients of unscaled losses would vanish; one that is not enabled scales nothing.

    Returns:
        The loss, a scalar. Where a gradient is not finite, the gradient of what is shared is not either.
    """
    parameters = [*shared, *others]
    rows = shared[0].new_empty(len(losses), sum(each.numel() for each in shared))
    is_reached = [False] * len(shared)
    sums: list[Tensor | None] = [None] * len(others)
    for row, own_loss in zip(rows, losses, strict=True):
        found = task_gradients(scaler.scale(own_loss), parameters)
        mine, own = found[: len(shared)], found[len(shared) :]
        row.copy_(world.mean(_flat(mine, shared)))
        is_reached = [before or now is not None for before, now in zip(is_reached, mine, strict=True)]
        sums = [_sum(before, now) for before, now in zip(sums, own, strict=True)]
    if scaler.is_enabled():
        scale = scaler.scale(torch.ones((), device=rows.device))
        rows /= scale
        sums = [each if each is None else each / scale for each in sums]
    weights = weigh(inner_products(rows)).to(rows)
    total = torch.split(weights @ rows, [each.numel() for each in shared])
    known = [_like(each, part) if so else None for each, part, so in zip(shared, total, is_reached, strict=True)]
    pairs = [(p, gradient) for p, gradient in zip(parameters, [*known, *sums], strict=True) if gradient is not None]
    loss_of: Any = _Known.apply
    loss: Tensor = loss_of(value.detach(), [gradient for _, gradient in pairs], *(p for p, _ in pairs))
    return loss


def _flat(gradients: Sequence[Tensor | None], parameters: Sequence[nn.Parameter]) -> Tensor:
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).detach().reshape(-1) for g, p in pairs])


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other


def _like(parameter: nn.Parameter, flat: Tensor) -> Tensor:
    """In the parameter's layout, as DDP expects of a gradient."""
    return torch.empty_like(parameter).copy_(flat.view(parameter.shape))


class _Known(torch.autograd.Function):
    """A number whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *_: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> Any:
        # The loss may live on for a while; what it knew is in the parameters' `.grad` from here on.
        gradients, ctx.gradients = ctx.gradients, None
        return (None, None, *(factor * each for each in gradients))
