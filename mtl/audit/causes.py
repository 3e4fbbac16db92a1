"""The most likely cause of a violation, worked out from what can be seen at that moment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mtl.audit.contract import Place


def cause_of_change(place: Place, tensor: Tensor, param_groups: Sequence[dict[str, Any]]) -> str:
    """Why a frozen tensor's bytes may have changed, with the fix."""
    if place.kind != "param":
        if place.owner.training:
            kind = type(place.owner).__name__
            return f"{kind} in train mode updates its buffers on every forward; keep the frozen module in eval mode"
        return "something writes to the buffer; a buffer that a frozen module updates in eval mode cannot be frozen"
    group = next((group for group in param_groups if any(p is tensor for p in group["params"])), None)
    if group is None:
        return "written outside the optimizers (load_state_dict, re-initialisation, .data, an optimizer not watched)"
    if tensor.grad is None and not tensor.requires_grad:
        return "an optimizer stepped it while it still had a gradient; build the optimizer from what trains only"
    if group.get("weight_decay"):
        return "weight decay moves a parameter whose gradient is zero; build the optimizer from what trains only"
    if group.get("momentum") or group.get("betas"):
        return "momentum moves a parameter whose gradient is zero; build the optimizer from what trains only"
    return "an optimizer holds it and stepped; build the optimizer from what trains only"
