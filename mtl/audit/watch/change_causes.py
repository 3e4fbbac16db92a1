"""The most likely cause of a change of frozen bytes, with the fix, from the bytes before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from mtl.audit.watch.causes import FROM_TRAINABLE
from mtl.audit.watch.change_size import bits_of
from mtl.audit.watch.frozen_tensor import FrozenTensor
from mtl.audit.watch.places import TensorPlace, is_sparse
from mtl.runtime.tensors import local


def cause_of_change(frozen: FrozenTensor, content: Tensor, groups: Sequence[dict[str, Any]]) -> str:
    """Why a frozen tensor's bytes may have changed.

    Args:
        frozen: The tensor.
        content: Its present bytes, on the host.
        groups: The param groups of all watched optimizers.
    """
    place, tensor = frozen.place, frozen.tensor
    owner = type(place.owner).__name__
    if place.kind == "attr":
        return f"code of {owner} writes to this attribute; take it out of the freeze if it is meant to change"
    if place.kind == "buffer":
        return _of_buffer(place, owner)
    if isinstance(place.owner, nn.Embedding | nn.EmbeddingBag) and place.owner.max_norm is not None:
        return f"the forward of {owner} renormalises the rows that it looks up (max_norm); leave max_norm out"
    group = next((group for group in groups if any(p is tensor for p in group["params"])), None)
    # An optimizer skips a tensor without a gradient.
    if group is None or (place.rows is None and not frozen.had_gradient):
        return _of_a_write(frozen, content)
    return _of_step(tensor, group) if place.rows is None else _of_step_of_rows(tensor, place.rows, group)


def _of_buffer(place: TensorPlace, owner: str) -> str:
    if isinstance(place.owner, _NormBase):
        if place.owner.training:
            return f"{owner} was run in train mode, which updates its statistics; keep it in eval mode"
        return (
            f"{owner} is in eval mode now: it was in train mode for a while (keep it in eval mode throughout), or code"
            " writes to its statistics (load_state_dict, DDP)"
        )
    if place.owner.training:
        return f"the forward of {owner} or other code writes to this buffer; keep the frozen module in eval mode"
    return (
        f"code writes to this buffer though {owner} is in eval mode (its forward, load_state_dict, DDP's"
        " broadcast_buffers); stop that, or take it back with !pattern"
    )


def _of_step_of_rows(tensor: Tensor, rows: slice, group: dict[str, Any]) -> str:
    gradient = None if tensor.grad is None else local(tensor.grad)
    is_zero = gradient is not None and not gradient.is_sparse and not bool(gradient[rows].any())
    if is_zero and not any(group.get(key) for key in ("weight_decay", "momentum", "betas")):
        return "their gradient is zero, and the optimizer has neither decay nor momentum: code writes to these rows"
    return "the optimizer moves these rows with the others; mask their gradient, without decay and momentum on them"


def _of_step(tensor: Tensor, group: dict[str, Any]) -> str:
    if tensor.grad is not None and bool(tensor.grad.any()):
        return f"an optimizer stepped it with a gradient; set grad = None when freezing, and {FROM_TRAINABLE}"
    if group.get("weight_decay"):
        return f"weight decay moves a parameter whose gradient is zero; {FROM_TRAINABLE}"
    if group.get("momentum") or group.get("betas"):
        return f"momentum moves a parameter whose gradient is zero; {FROM_TRAINABLE}"
    return f"an optimizer holds it and stepped; {FROM_TRAINABLE}"


def _of_a_write(frozen: FrozenTensor, content: Tensor) -> str:
    """The likely cause of a write to a tensor that no watched optimizer holds, from its bytes, address and version."""
    before = frozen.original
    if is_sparse(frozen.tensor):
        return "its elements were written, or others added; leave frozen tensors alone"
    if before.shape != content.shape or before.dtype != content.dtype:
        return "its shape or type was changed (.data, .half(), .to()) after the freeze; convert before"
    if (narrow := _narrower(before, content)) is not None:
        return f"it went through {narrow} and back (.half() or .bfloat16(), then .float()); leave frozen weights alone"
    if bool(content.isnan().any()) and not bool(before.isnan().any()):
        return "NaN was written outside the watched optimizers; look for the overflow, or the code that writes"
    if torch.equal(_wide(before), _wide(content)):
        return "only the sign of zeros changed, as by a multiplication or a conversion; do not write to frozen weights"
    if torch.equal(_sorted(before), _sorted(content)):
        return "its elements were permuted in place; permute before the freeze"
    if (factor := _common_factor(before, content)) is not None:
        return (
            f"every element was multiplied by {factor:.6g}, as weight decay does; an optimizer that is not watched, or"
            f" code, scales it: {FROM_TRAINABLE}"
        )
    if frozen.was_moved():
        return "its data was replaced (.data = ..., .to(), .half()) outside the optimizers; do it before the freeze"
    if not frozen.was_written():
        return (
            "written past torch's version counter (.data, a numpy alias, a fused optimizer not watched); write before"
            " the freeze"
        )
    return (
        "written outside the watched optimizers (load_state_dict, re-initialisation, copy_, an optimizer not watched);"
        " do it before the freeze, or watch the optimizer"
    )


def _narrower(before: Tensor, content: Tensor) -> str | None:
    for narrow in (torch.float16, torch.bfloat16):
        if before.dtype in (torch.float32, torch.float64):
            there_and_back = before.to(narrow).to(before.dtype)
            if torch.equal(bits_of(there_and_back), bits_of(content)):
                return str(narrow).removeprefix("torch.")
    return None


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128) if tensor.is_complex() else tensor.double()


def _sorted(tensor: Tensor) -> Tensor:
    return bits_of(tensor).sort().values


def _common_factor(before: Tensor, content: Tensor) -> float | None:
    """The factor between 0.5 and 1 that takes all elements of one tensor to the other's, up to rounding."""
    if not before.is_floating_point() or before.numel() < 4:
        return None
    old, new = before.double().flatten(), content.double().flatten()
    there = old != 0
    if not bool(there.any()) or not bool(new.isfinite().all()):
        return None
    factor = float((new[there] / old[there]).median())
    rounding = 4 * torch.finfo(before.dtype).eps
    is_common = bool(((new - factor * old).abs() <= rounding * old.abs()).all())
    return factor if is_common and 0.5 < factor < 1 else None
