"""Depthwise convolutions whose weight gradient is a sum of shifted products.

For 5 x 5 kernels on small maps, oneDNN has no kernel of its own for that gradient: it takes ten times as long as the
forward, or more. Forward, input gradient and bias gradient stay torch's, to the bit.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeAlias

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.padding import pad_same
from torch import Tensor, nn
from torch.nn import functional

Pair: TypeAlias = tuple[int, ...]


def weight_gradient(
    images: Tensor, gradient: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """The gradient of a depthwise convolution's weight: for each tap of the kernel, a product and a sum.

    Args:
        images: The convolution's input, "b c h w", in any layout.
        gradient: Of the loss with respect to its output, "b c oh ow".
        kernel: Height and width of the kernel; the others are as `torch.nn.Conv2d` has them, down and across.
        stride: Pixels from one output to the next.
        padding: Zeros on either side.
        dilation: Pixels from one tap to the next.

    Returns:
        "c 1 kh kw".
    """
    down, across = (
        [_overlap(tap * apart - zeros, each, size, out_size) for tap in range(taps)]
        for taps, each, zeros, apart, size, out_size in zip(
            *(kernel, stride, padding, dilation, images.shape[2:], gradient.shape[2:]), strict=True
        )
    )
    # Products with the zeros of the padding are left out: of a 5 x 5 kernel on 3 x 3 pixels they are two thirds.
    sums = [
        (images[:, :, rows, columns] * gradient[:, :, out_rows, out_columns]).sum(dim=(0, 2, 3))
        for rows, out_rows in down
        for columns, out_columns in across
    ]
    return torch.stack(sums, dim=-1).view(-1, 1, *kernel)


def _overlap(shift: int, stride: int, size: int, out_size: int) -> tuple[slice, slice]:
    """The pixels of a line that one tap reads, and the outputs for which it does.

    Args:
        shift: The pixel that the tap reads for the first output; may lie outside.
        stride: Pixels from one output to the next.
        size: Pixels.
        out_size: Outputs.
    """
    first = max(0, -(shift // stride))
    last = min(out_size - 1, (size - 1 - shift) // stride)
    if last < first:
        return slice(0, 0), slice(0, 0)
    return slice(first * stride + shift, last * stride + shift + 1, stride), slice(first, last + 1)


class _Depthwise(torch.autograd.Function):
    """`functional.conv2d` with one group a channel and `weight_gradient` in its backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        images: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair
    ) -> Tensor:
        return functional.conv2d(images, weight, bias, stride, padding, dilation, len(weight))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        del output
        images, weight, bias, *geometry = inputs
        ctx.save_for_backward(images, weight)
        ctx.bias_shape = None if bias is None else list(bias.shape)
        ctx.geometry = geometry

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        images, weight = ctx.saved_tensors
        stride, padding, dilation = ctx.geometry
        of_images, of_weight, of_bias = ctx.needs_input_grad[:3]
        given = [None, None, None]
        if of_images or of_bias:
            geometry = (list(stride), list(padding), list(dilation), False, [0, 0], len(weight))
            given = torch.ops.aten.convolution_backward(
                gradient, images, weight, ctx.bias_shape, *geometry, [of_images, False, of_bias]
            )
        own = None
        if of_weight:
            own = weight_gradient(images, gradient, weight.shape[2:], stride, padding, dilation)
            # The strides of a dimension of 1 mean nothing, but DDP compares them.
            own = own.as_strided(weight.shape, weight.stride())
        return given[0], own, given[2], None, None, None


def _applies(images: Tensor, weight: Tensor) -> bool:
    """Whether a pass is one that was timed: with a gradient, in float32, on a CPU, not compiled."""
    return (
        weight.requires_grad
        and torch.is_grad_enabled()
        and images.device.type == "cpu"
        and images.dtype == weight.dtype
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


class ProductConv2d(nn.Conv2d):
    """A depthwise `torch.nn.Conv2d` with the weight gradient of this module."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002  torch's name
        if _applies(input, weight):
            output: Tensor = _Depthwise.apply(input, weight, bias, self.stride, self.padding, self.dilation)
        else:
            output = super()._conv_forward(input, weight, bias)
        return output


class ProductConv2dSame(Conv2dSame):
    """The same for timm's convolution with TensorFlow's padding."""

    def forward(self, x: Tensor) -> Tensor:
        if _applies(x, self.weight):
            x = pad_same(x, list(self.weight.shape[-2:]), list(self.stride), list(self.dilation))
            output: Tensor = _Depthwise.apply(x, self.weight, self.bias, self.stride, (0, 0), self.dilation)
        else:
            output = super().forward(x)  # type: ignore[no-untyped-call]
        return output


_REPLACED: Mapping[type[nn.Conv2d], type[nn.Conv2d]] = {nn.Conv2d: ProductConv2d, Conv2dSame: ProductConv2dSame}


def depthwise_layers(model: nn.Module) -> dict[str, nn.Conv2d]:
    """The depthwise convolutions that `use_products` can change, by name."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and type(module) in (*_REPLACED, *_REPLACED.values()):
            is_depthwise = 1 < module.in_channels == module.out_channels == module.groups
            if is_depthwise and module.padding_mode == "zeros" and not isinstance(module.padding, str):
                found[name] = module
    return found


def use_products(model: nn.Module, names: Collection[str]) -> None:
    """Has these layers, from `depthwise_layers`, compute their weight gradient as products, and all others by torch.

    Parameters, their names and hooks stay; only the class of a module changes.
    """
    plain = {own: other for other, own in _REPLACED.items()}
    for name, module in depthwise_layers(model).items():
        kind = type(module)
        module.__class__ = _REPLACED.get(kind, kind) if name in names else plain.get(kind, kind)
