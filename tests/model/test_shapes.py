"""Shapes that are found quickly are those that torch finds: shape, type, strides, versions, and autograd's graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mtl.model.shapes import _KERNELS, quick_shapes

SHAPES = [(2, 8, 5, 7), (2, 8, 1, 1), (1, 8, 5, 5), (1, 1, 3, 1), (1, 16), (2, 9, 8)]


def tensors(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Tensor]:
    """Tensors of a shape in several layouts."""
    plain = torch.zeros(shape, device="meta", dtype=dtype)
    yield plain
    if plain.ndim == 4:
        yield plain.to(memory_format=torch.channels_last)
        yield torch.zeros(shape[1], shape[0], *shape[2:], device="meta", dtype=dtype).transpose(0, 1)
        yield plain.as_strided(shape, (5, 1, 9 * shape[1], shape[1]))
    yield torch.zeros(*shape[:-1], 2 * shape[-1], device="meta", dtype=dtype)[..., ::2]


UNARY: list[Callable[[Tensor], Tensor]] = [
    *(functional.relu, functional.relu6, functional.hardswish, functional.hardsigmoid, functional.gelu),
    *(functional.silu, functional.elu, functional.leaky_relu, torch.sigmoid, torch.tanh),
    *(lambda t: t + 1, lambda t: t - 1.5, lambda t: t * 2, lambda t: t / 3, lambda t: 1 - t),
    *(lambda t: t + t, lambda t: t * t.detach(), lambda t: t - t[:1], lambda t: t / t.double()),
    lambda t: t + torch.zeros_like(t, memory_format=torch.contiguous_format),
]
IN_PLACE = (functional.relu, functional.relu6, functional.hardswish, functional.elu)


def described(tensor: Tensor | None) -> Any:
    return None if tensor is None else (tuple(tensor.shape), tensor.dtype, tensor.stride(), tensor._version)


def results() -> list[Any]:
    found: list[Any] = []
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16)[: 1 + (shape == SHAPES[0])]:
            for given in tensors(shape, dtype):
                images = given.detach().requires_grad_()
                for number, function in enumerate(UNARY):
                    output = function(images)
                    (gradient,) = torch.autograd.grad(output.sum(), images)
                    node = type(output.grad_fn).__name__
                    found.append((number, given.stride(), described(output), described(gradient), node))
                for change in IN_PLACE:
                    changed = given.clone()
                    change(changed, inplace=True)  # type: ignore[call-arg]
                    found.append(described(changed))
                found.append(described(given.clone().normal_()))
                found += batch_norms(images)
    return found


def batch_norms(images: Tensor) -> Iterator[Any]:
    for training in (True, False):
        for has_weight, has_statistics in ((True, True), (False, True), (True, False)):
            weight, bias = (torch.zeros(images.shape[1], device="meta", requires_grad=True) for _ in range(2))
            mean, var = (torch.zeros(images.shape[1], device="meta") for _ in range(2))
            statistics = (mean, var) if has_statistics else (None, None)
            own = (weight, bias) if has_weight else (None, None)
            try:
                output = functional.batch_norm(images, *statistics, *own, training)
            except (ValueError, RuntimeError) as error:
                yield str(error)
                continue
            wanted = [images, *(each for each in own if each is not None)]
            gradients = torch.autograd.grad(output.sum(), wanted)
            yield training, described(output), [*map(described, gradients)], described(mean), str(output.grad_fn)[:20]


def dump() -> list[str]:
    """What torch has registered for the operations."""
    return [torch._C._dispatch_dump(f"aten::{name}") for name in _KERNELS]


@pytest.mark.slow
def test_they_are_those_that_torch_finds_and_torch_finds_them_again_afterwards() -> None:
    plain = results()
    kernels = dump()
    with quick_shapes():
        with quick_shapes():
            assert dump() != kernels
        assert results() == plain
    assert dump() == kernels


@pytest.mark.parametrize("name", _KERNELS)
def test_torchs_own_way_is_there_to_fall_back_to(name: str) -> None:
    packet, _, overload = name.partition(".")
    kernels = getattr(getattr(torch.ops.aten, packet), overload or "default").py_kernels
    assert torch._C.DispatchKey.Meta in kernels
