"""Shapes on the meta device at little cost.

torch finds the shapes of norms and activations on the meta device by decomposing them in Python, a millisecond each: a
pass of a convolutional trunk takes longer there than on a CPU. In a block of `quick_shapes`, they are found directly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

Kernel = Callable[..., Any]


@contextmanager
def quick_shapes() -> Iterator[None]:
    """Finds shapes, types and layouts of common operations on the meta device directly; autograd sees no difference.

    What is not plain (of several types or layouts, strided) is left to torch. Blocks may be inside each other.
    """
    library: Any = Library("aten", "IMPL", "Meta")  # type: ignore[no-untyped-call]
    try:
        for name, kernel in _KERNELS.items():
            library.impl(name, kernel, allow_override=True)
        yield
    finally:
        library._destroy()


def _torchs(name: str) -> Kernel:
    """Torch's own way to the shape of an operation."""
    packet, overload = [*name.split("."), "default"][:2]
    own: Kernel = getattr(getattr(torch.ops.aten, packet), overload).py_kernels[torch._C.DispatchKey.Meta]
    return own


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor of floats lies in memory without gaps, in one of the two usual layouts."""
    if not tensor.is_floating_point():
        return False
    for layout in (torch.contiguous_format, torch.channels_last) if tensor.ndim == 4 else (torch.contiguous_format,):
        if tensor.is_contiguous(memory_format=layout):
            # Where an extent is 1, several strides stand for one layout.
            own = tensor.stride()
            return 1 not in tensor.shape or own == torch.empty_like(tensor, memory_format=layout).stride()
    return False


def _same(tensors: Sequence[Any]) -> bool:
    """Whether plain tensors are of one shape, type and layout."""
    first = tensors[0]
    return _is_plain(first) and all(
        isinstance(each, Tensor)
        and each.shape == first.shape
        and each.dtype == first.dtype
        and each.stride() == first.stride()
        for each in tensors[1:]
    )


def _like_first(name: str, num_tensors: int) -> Kernel:
    """The kernel of an operation on some tensors, the first of its arguments, whose result is as they are."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        if len(args) >= num_tensors and _same(args[:num_tensors]):
            return torch.empty_like(args[0])
        return _torchs(name)(*args, **kwargs)

    return kernel


def _arithmetic(name: str) -> Kernel:
    """The kernel of a sum, difference, product or quotient."""

    def kernel(one: Any, other: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(other, int | float) and isinstance(one, Tensor) and _is_plain(one):
            return torch.empty_like(one)
        if isinstance(other, Tensor) and isinstance(one, Tensor) and _same((one, other)):
            return torch.empty_like(one)
        return _torchs(name)(one, other, *args, **kwargs)

    return kernel


def _batch_norm(name: str) -> Kernel:
    def kernel(images: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any) -> Any:
        given = [each for each in (weight, bias, *rest[:2]) if isinstance(each, Tensor)]
        if not _is_plain(images) or images.ndim < 2 or any(each.dtype != images.dtype for each in given):
            return _torchs(name)(images, weight, bias, *rest)
        mean = images.new_empty(images.shape[1])
        return torch.empty_like(images), mean, torch.empty_like(mean)

    return kernel


def _batch_norm_backward(gradient: Tensor, images: Tensor, weight: Tensor | None, *rest: Any) -> Any:
    given = [each for each in (weight, *rest[:4]) if each is not None]
    if not _same((gradient, images)) or any(each.dtype != images.dtype for each in given):
        return _torchs("native_batch_norm_backward")(gradient, images, weight, *rest)
    vector, wanted = images.new_empty(images.shape[1]), rest[-1]
    return (
        torch.empty_like(images) if wanted[0] else None,
        vector if wanted[1] else None,
        torch.empty_like(vector) if wanted[2] else None,
    )


def _normal(tensor: Tensor, mean: float = 0.0, std: float = 1.0, **kwargs: Any) -> Tensor:
    if std < 0 or not tensor.is_floating_point():
        own: Tensor = _torchs("normal_")(tensor, mean, std, **kwargs)
        return own
    return tensor


_UNARY = ("elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "relu", "sigmoid", "silu", "tanh")
_BACKWARD = ("gelu", "hardsigmoid", "hardswish", "hardtanh", "threshold")
_KERNELS: dict[str, Kernel] = {
    **{name: _like_first(name, 1) for name in _UNARY},
    **{f"{name}_backward": _like_first(f"{name}_backward", 2) for name in _BACKWARD},
    **{name: _arithmetic(name) for name in ("add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor")},
    **{
        name: _batch_norm(name)
        for name in ("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training")
    },
    "native_batch_norm_backward": _batch_norm_backward,
    "normal_": _normal,
}
