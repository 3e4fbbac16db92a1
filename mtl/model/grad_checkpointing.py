"""Gradient checkpointing: activations are recomputed in the backward, without updating BatchNorm statistics twice."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase


def enable_grad_checkpointing(trunk: nn.Module) -> None:
    """Makes a timm trunk store only the inputs of its blocks, and recompute the rest in the backward.

    BatchNorm statistics are updated in the forward only, not again in the recomputation.

    Raises:
        AttributeError, AssertionError, NotImplementedError: timm does not support it for this architecture.
    """
    method: Any = trunk.set_grad_checkpointing
    method(True)
    for module in trunk.modules():
        if isinstance(module, _NormBase):
            module.register_forward_pre_hook(_swap_in_copies)
            # Also if the forward is stopped early, as it is once the backward has all tensors that it needs.
            module.register_forward_hook(_restore_buffers, always_call=True)


def _swap_in_copies(norm: nn.Module, _: Any) -> None:
    if norm.training and _is_in_backward():
        norm.__dict__["_saved_buffers"] = dict(norm._buffers)
        norm._buffers.update({name: None if b is None else b.clone() for name, b in norm._buffers.items()})


def _restore_buffers(norm: nn.Module, *_: Any) -> None:
    norm._buffers.update(norm.__dict__.pop("_saved_buffers", {}))


def _is_in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)
