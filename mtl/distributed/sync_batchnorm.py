"""BatchNorm that trains on the global batch: its statistics are taken over the images of all processes.

torch's own SyncBatchNorm runs on GPUs only, makes the host wait for the device in each layer, and is another class than
the layer it replaces, which patterns such as `type:BatchNorm2d` would no longer select. Here layers stay as they are;
in train mode they normalise with another mean and variance. In eval mode, as while frozen, nothing is shared.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.overrides import TorchFunctionMode

from mtl.distributed.world import World


def synchronise(module: nn.Module, world: World) -> None:
    """Makes BatchNorm layers in train mode take their statistics over all processes; does nothing with one process.

    Every process has to run the same layers, forward and backward, in the same order.

    Args:
        module: The module, in which layers, names and tensors stay the same.
        world: The processes, after `World.start`.
    """
    if world.is_alone:
        return
    for norm in module.modules():
        if isinstance(norm, _BatchNorm) and not isinstance(norm, SyncBatchNorm):
            norm.forward = MethodType(_forward, norm)  # type: ignore[method-assign]


def _forward(norm: nn.Module, x: Tensor) -> Tensor:
    """The layer's own forward, whatever it does besides (timm's has an activation), with shared statistics."""
    own: Any = type(norm).forward
    with _SharedBatchNorm() if norm.training else nullcontext():
        result: Tensor = own(norm, x)
    return result


class _SharedBatchNorm(TorchFunctionMode):
    """Takes the place of `torch.nn.functional.batch_norm`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_batch_norm if func is F.batch_norm else func)(*args, **(kwargs or {}))


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """As `torch.nn.functional.batch_norm`, with the statistics of all processes."""
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, momentum=momentum, eps=eps)
    mean, var, count = _global_statistics(x.detach())
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            # As BatchNorm has it: normalised with the variance of the batch, kept is that of the population.
            running_var.lerp_((var * count / (count - 1)).to(running_var.dtype), momentum)
    normalised: Tensor = _Normalise.apply(x, weight, bias, mean, var, count, eps)
    return normalised


def _global_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance of each channel of "b c ...", and how many values of a channel all processes have together.

    In float32 or better; equal in every bit on all processes, since each adds up the same numbers in the same order.
    """
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    axes = [0, *range(2, x.ndim)]
    var, mean = torch.var_mean(values, axes, correction=0)
    own = torch.cat([mean, var, mean.new_full((1,), x.numel() // x.shape[1])])
    every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(every, own)
    means, variances, counts = torch.split(torch.stack(every), [x.shape[1], x.shape[1], 1], dim=1)
    count = counts.sum()
    share = counts / count
    mean = (share * means).sum(0)
    # Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    var = (share * (variances + (means - mean).square())).sum(0)
    return mean, var, count


class _Normalise(torch.autograd.Function):
    """`(x - mean) / sqrt(var + eps) * weight + bias`, of which mean and variance are those of all processes' x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        count: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(var + eps), count)
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse, count = ctx.saved_tensors
        shape = [1, -1, *[1] * (x.ndim - 2)]
        axes = [0, *range(2, x.ndim)]
        wide = grad.to(mean.dtype)
        normalised = (x.to(mean.dtype) - mean.view(shape)) * inverse.view(shape)
        sum_of_grad, sum_of_both = wide.sum(axes), (wide * normalised).sum(axes)
        of_weight = sum_of_both.to(weight.dtype) if ctx.needs_input_grad[1] else None
        of_bias = sum_of_grad.to(weight.dtype) if ctx.needs_input_grad[2] else None
        if not ctx.needs_input_grad[0]:
            return None, of_weight, of_bias, None, None, None, None
        sums = torch.cat([sum_of_grad, sum_of_both])
        dist.all_reduce(sums)
        mean_of_grad, mean_of_both = (sums / count).chunk(2)
        scale = inverse if weight is None else inverse * weight
        of_x = (wide - mean_of_grad.view(shape) - normalised * mean_of_both.view(shape)) * scale.view(shape)
        return of_x.to(x.dtype), of_weight, of_bias, None, None, None, None
