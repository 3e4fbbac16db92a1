"""The most likely cause of a violation, with the fix, worked out from what can be seen at that moment."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from mtl.audit.contract import Place

STALE_GRADIENT = "a gradient left from before the freeze; set grad = None when freezing"
LATE_FREEZE = "it required a gradient when the loss was computed; enforce the freeze before the forward"
STILL_REQUIRED = "requires_grad was not switched off, or was switched on again after the freeze"
REPLACED = "the module or tensor was replaced after the freeze"
TRAIN_MODE = "a .train() after the freeze; keep the frozen module in eval mode"
EARLY_OPTIMIZER = "the optimizer was built before the freeze; build it from what trains only"
LATE_THAW = "thawed after the optimizer was built; rebuild the optimizer when a phase begins"
SHARED = "a tied or viewed tensor; freeze both names or neither"

_FROM_WHAT_TRAINS = "build the optimizer from what trains only"


def of_change(place: Place, tensor: Tensor, param_groups: Iterable[dict[str, Any]]) -> str:
    """Why a frozen tensor's bytes may have changed."""
    owner = type(place.owner).__name__
    if place.kind == "attr":
        return f"code of {owner} writes to this attribute; take it out of the freeze if it is meant to change"
    if place.kind == "buffer" and isinstance(place.owner, _NormBase):
        return f"{owner} was run in train mode, which updates its statistics; keep the frozen module in eval mode"
    if place.kind == "buffer":
        return f"the forward of {owner} or other code writes to this buffer; keep the frozen module in eval mode"
    group = next((group for group in param_groups if any(p is tensor for p in group["params"])), None)
    if group is None:
        return "written outside the optimizers (load_state_dict, re-initialisation, .data, an optimizer not watched)"
    if tensor.grad is not None and bool(tensor.grad.any()):
        return f"an optimizer stepped it with a gradient; set grad = None when freezing, and {_FROM_WHAT_TRAINS}"
    if group.get("weight_decay"):
        return f"weight decay moves a parameter whose gradient is zero; {_FROM_WHAT_TRAINS}"
    if group.get("momentum") or group.get("betas"):
        return f"momentum moves a parameter whose gradient is zero; {_FROM_WHAT_TRAINS}"
    return f"an optimizer holds it and stepped; {_FROM_WHAT_TRAINS}"
