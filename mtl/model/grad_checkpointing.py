"""Gradient checkpointing: activations that are computed again in the backward, with nothing done twice."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase


def compute_again(trunk: nn.Module) -> None:
    """Has a timm trunk keep only what goes into its blocks, and compute the rest again in the backward.

    BatchNorm statistics move in the forward alone: a second time in the backward they would move twice as far.

    Raises:
        AttributeError, AssertionError, NotImplementedError: timm cannot do it for this architecture.
    """
    method: Any = trunk.set_grad_checkpointing
    method(True)
    for module in trunk.modules():
        if isinstance(module, _NormBase):
            module.register_forward_pre_hook(_let_rest)
            # Also if the forward is broken off, as it is once all that the backward needs is there.
            module.register_forward_hook(_wake, always_call=True)


def _let_rest(norm: nn.Module, _: Any) -> None:
    if norm.training and _is_in_backward():
        # Copies move in their place.
        norm.__dict__["_resting"] = dict(norm._buffers)
        norm._buffers.update({name: None if b is None else b.clone() for name, b in norm._buffers.items()})


def _wake(norm: nn.Module, *_: Any) -> None:
    norm._buffers.update(norm.__dict__.pop("_resting", {}))


def _is_in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)
