"""Operations on the meta device whose outputs follow from shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten


class ByShape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context in which BatchNorm and optimizers that step lists of tensors cost little on the meta device.

    torch composes both there of many operations in Python, which take most of the time of a rehearsed step. In this
    context they return empty tensors of the same shapes. Other operations, and other devices, are left as they are.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _OUTPUTS and not kwargs and args[0].is_meta:
            return _OUTPUTS[func](*args)
        if _steps_lists(func) and all(each.is_meta for each in args[0]):
            return None
        return func(*args, **(kwargs or {}))


@cache
def _steps_lists(func: Any) -> bool:
    """Whether an operation changes values of a list of tensors, and neither their shapes nor types."""
    name: str = func.name().partition(".")[0]
    return name.startswith("aten::_foreach_") and name.endswith("_")


def _norm(images: Tensor, weight: Tensor | None, *settings: Any) -> tuple[Tensor, ...]:
    """The output, then mean and inverse deviation of each channel, which the backward needs in training only."""
    training: bool = settings[3]
    return (torch.empty_like(images), *(_of_channels(images, weight, training) for _ in range(2)))


def _norm_backward(_: Tensor, images: Tensor, weight: Tensor | None, *settings: Any) -> tuple[Tensor | None, ...]:
    """The gradients of images, weight and bias, as far as they are wanted."""
    wanted: Sequence[bool] = settings[-1]
    gradients = (torch.empty_like(images), *(_of_channels(images, weight, True) for _ in range(2)))
    return tuple(each if is_wanted else None for each, is_wanted in zip(gradients, wanted, strict=True))


def _of_channels(images: Tensor, weight: Tensor | None, is_needed: bool) -> Tensor:
    like = images if weight is None else weight
    return like.new_empty(images.shape[1] if is_needed else 0)


_OUTPUTS: dict[Any, Callable[..., tuple[Tensor | None, ...]]] = {
    _aten.native_batch_norm.default: _norm,
    _aten.native_batch_norm_backward.default: _norm_backward,
}
