"""The most likely cause of a violation, with the fix, worked out from what can be seen at that moment."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from mtl.audit.offline.difference import bits_of
from mtl.audit.watch.frozen_tensor import Watched
from mtl.audit.watch.places import Place, is_sparse
from mtl.runtime.tensors import local

STALE_GRADIENT = "a gradient left from before the freeze; set grad = None when freezing"
GRADIENT_BY_HAND = (
    "code gave it one (.grad = ..., jac_to_grad, requires_grad on for a while); leave it None on what is frozen"
)
LATE_FREEZE = "it required a gradient when the loss was computed; enforce the freeze before the forward"
STILL_REQUIRED = "requires_grad was not switched off, or was switched on again after the freeze"
REPLACED = "the module or tensor was replaced after the freeze; replace before, and build the optimizer anew"
TRAIN_MODE = "a .train() after the freeze; keep the frozen module in eval mode"
BATCH_STATISTICS = (
    "track_running_stats=False has it normalise by each batch, in eval mode too, so that its output is not constant;"
    " keep its running statistics, in eval mode"
)
DROPOUT = "the frozen module is in train mode, so that its output is not constant; keep it in eval mode"
EARLY_OPTIMIZER = "the optimizer was built before the freeze; build it from what trains only"
ADDED_LATER = (
    "an optimizer was given it after the phase began (add_param_group, or one built from all parameters);"
    " build it from what trains only"
)
LATE_THAW = "thawed after the optimizer was built; rebuild the optimizer when a phase begins"
LEFT_OUT = "the optimizer was built without it; build it from all that is to train, or name it in freeze"
ANOTHER_MODEL = (
    "the optimizer holds other tensors of its shape: those of a copy (deepcopy), or from before .to() or a swap; build"
    " it from this model's parameters, last"
)
ADDED = (
    "it was put there after the phase began (an adapter, a new layer); add it before, and take it back with !pattern if"
    " it is to train"
)
TRAINED_REPLACED = (
    "it was put there after the optimizer was built (a swapped module, a new nn.Parameter, assign=True); build the"
    " optimizer anew"
)
WHILE_STOPPED = (
    "it was changed while the run was stopped (another checkpoint, an edited file, other weights loaded); go on from"
    " the tensors that were saved with the audit's state"
)
WHILE_STOPPED_OR_BEFORE = (
    "it was changed while the run was stopped, or shortly before that, unseen; verify before the state is taken,"
    " and go on from the tensors that were saved with it"
)
FROZEN_APART = (
    "these ranks loaded other weights, or code wrote to them on some ranks only; load the same on all before the freeze"
)
TRAINED_APART = (
    "they began with other weights, their gradients were not averaged (no DDP, no_sync() at a step, a parameter that"
    " DDP was not told of), or code wrote on some ranks only; broadcast the weights, and average all gradients"
)
SHARED = "a tied or viewed tensor; freeze both names or neither"
TWICE = "two param groups or optimizers step it; give each parameter to one"
HIDDEN = (
    "its module is in a Python list or dictionary, where parameters() does not look; use nn.ModuleList or ModuleDict"
)
PLAIN_TENSOR = "a plain tensor is no parameter, so that parameters() left it out; wrap it in nn.Parameter"
NOT_THAWED = "requires_grad was left off; switch it on when the phase begins, or name it in freeze"
FIXED = "fixed when the model was built, such as a table of positions; name it in freeze to have its bits proven"
ZERO_GRADIENT = (
    "its path to the loss is multiplied by zero (a dead layer, a mask, a loss weight of 0), or the loss itself is 0; or"
    " name it in freeze or idle"
)
NO_GRADIENT = "no loss depends on it (not called, detached, under no_grad, a task left out); or name it in freeze"
UNDERFLOW = (
    "in {kind} a gradient below {tiny:.0e} is zero; scale the loss (GradScaler), or use bfloat16 or float32; if it is"
    " no underflow, its path to the loss is multiplied by zero"
)
NEVER_STEPPED = (
    "step() of its optimizer was never called (forgotten, or skipped every time by a grad scaler); call backward, step,"
    " zero_grad in this order"
)
ZEROED_TOO_EARLY = (
    "step() found no gradient, since zero_grad() came between backward() and step(); call backward, step, zero_grad in"
    " this order"
)
NO_LONGER_STEPPED = (
    "its optimizer has taken no step since (no longer called, or a grad scaler skips every one, as with gradients that"
    " are NaN or infinite)"
)
NO_LONGER_SEEN = (
    "step() is no longer called, a grad scaler skips every step, or the optimizer was rebuilt; attach the new one, too"
)
RATE_FELL = "the learning rate of its param group has been 0 since; see the schedule and its milestones"
NOT_FINITE = (
    "NaN or infinite gradients were stepped (a loss of log 0, x / 0, a rate too high, fp16 without a scaler); clip, and"
    " leave out steps whose loss is not finite"
)
DROPPED = (
    "zero_grad() comes after every backward, and step() after few of them; to accumulate gradients, clear them after"
    " the step only"
)
REBOUND = "code of {owner} puts another tensor there; take it out of the freeze if it is meant to change"
PASSING = "a buffer that no checkpoint holds was made again, as caches are; register it as persistent if it is state"
NO_STEP_SEEN = "{number} backwards were seen, but no step"
SWITCHED_OFF = "requires_grad was switched off in mid-phase; end the phase there, and name it in the next one's freeze"
CUT_OFF = (
    "no loss depends on it any more (detached, under no_grad, a task left out); end the phase there, and name it in the"
    " next one's freeze"
)
ZERO_RATE = "its param group has the learning rate 0; give it one, or name it in freeze"
TOO_SMALL = (
    "its updates are smaller than its type can hold, or something writes it back; raise the rate, or use float32"
)

_FROM_WHAT_TRAINS = "build the optimizer from what trains only"
_FLAG = "requires_grad"


def of_flag(tensor: Tensor, modules: Iterable[nn.Module]) -> str | None:
    """Why a flag that was meant to be set is not: it was written where torch does not read it.

    Args:
        tensor: The parameter.
        modules: The modules around it, the innermost first.
    """
    for module in modules:
        if _FLAG in vars(module):
            kind = type(module).__name__
            return (
                f"`{_FLAG} = ...` was set on a {kind}, where it means nothing; call requires_grad_(...) on the module"
            )
    for holder in (tensor, *modules):
        for key in vars(holder):
            if key != _FLAG and SequenceMatcher(None, key, _FLAG).ratio() > 0.85:
                return f"`{key} = ...` was set, which torch does not know; the name is {_FLAG}"
    return None


def of_zero_gradient(dtype: torch.dtype) -> str:
    """Why a gradient of this type may be zero."""
    if dtype != torch.float16:
        return ZERO_GRADIENT
    kind = str(dtype).removeprefix("torch.")
    return UNDERFLOW.format(kind=kind, tiny=torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)


def of_absence(tensor: Tensor, groups: Sequence[dict[str, Any]], model: Iterable[Tensor], was_frozen: bool) -> str:
    """Why no optimizer holds a parameter that is to train.

    Args:
        tensor: The parameter.
        groups: The param groups of all optimizers.
        model: All tensors that hang in the model.
        was_frozen: Whether it required no gradient earlier.
    """
    mine = {id(each) for each in model}
    strangers = [p for group in groups for p in group["params"] if id(p) not in mine]
    if any(each.shape == tensor.shape for each in strangers):
        return ANOTHER_MODEL
    return LATE_THAW if was_frozen else LEFT_OUT


def of_replacement(place: Place) -> str:
    """Why a tensor no longer hangs in its place."""
    owner, key = place.owner, place.key
    if key in getattr(owner, "parametrizations", {}):
        return f"a parametrization of {key} was registered after the freeze; register it before"
    for suffix, what in (("_orig", "pruning"), ("_g", "weight norm"), ("_v", "weight norm")):
        if f"{key}{suffix}" in owner._parameters:
            return f"{what} was put on {key} after the freeze; do it before"
    if key in owner._parameters:
        return (
            "it was registered anew after the freeze (load_state_dict(assign=True), a new nn.Parameter); do it before"
        )
    return REPLACED


def of_removal(place: Place) -> str:
    """Why nothing has a frozen tensor's name any more."""
    if place.key in getattr(place.owner, "parametrizations", {}) or f"{place.key}_orig" in place.owner._parameters:
        return of_replacement(place)
    return "the module or tensor was deleted, replaced or wrapped after the freeze; do it before"


def of_addition(place: Place) -> str:
    """Why a tensor has come into the frozen part."""
    if place.key.endswith(("_orig", "_mask")):
        return "pruning was put on after the freeze; do it before"
    return ADDED


def of_copy(follows: bool) -> str:
    """Why the average of a frozen tensor may have changed; `follows` if the tensor itself has."""
    if follows:
        return "it follows the tensor that it averages, which has changed itself; mend that"
    return "the average is not exact for what is frozen; average what trains only, or by lerp"


def of_change(watched: Watched, content: Tensor, groups: Sequence[dict[str, Any]]) -> str:
    """Why a frozen tensor's bytes may have changed.

    Args:
        watched: The tensor.
        content: Its bytes now, on the host.
        groups: The param groups of all watched optimizers.
    """
    place, tensor = watched.place, watched.tensor
    owner = type(place.owner).__name__
    if place.kind == "attr":
        return f"code of {owner} writes to this attribute; take it out of the freeze if it is meant to change"
    if place.kind == "buffer" and isinstance(place.owner, _NormBase) and not place.owner.training:
        return (
            f"{owner} is in eval mode now: it was in train mode for a while (keep it in eval mode throughout), or code"
            " writes to its statistics (load_state_dict, DDP)"
        )
    if place.kind == "buffer" and isinstance(place.owner, _NormBase):
        return f"{owner} was run in train mode, which updates its statistics; keep it in eval mode"
    if place.kind == "buffer" and place.owner.training:
        return f"the forward of {owner} or other code writes to this buffer; keep the frozen module in eval mode"
    if place.kind == "buffer":
        return (
            f"code writes to this buffer though {owner} is in eval mode (its forward, load_state_dict, DDP's"
            " broadcast_buffers); stop that, or take it back with !pattern"
        )
    if isinstance(place.owner, nn.Embedding | nn.EmbeddingBag) and place.owner.max_norm is not None:
        return f"the forward of {owner} renormalises the rows that it looks up (max_norm); leave max_norm out"
    group = next((group for group in groups if any(p is tensor for p in group["params"])), None)
    # An optimizer leaves alone what has no gradient.
    if group is None or (place.rows is None and not watched.had_gradient):
        return _of_a_write(watched, content)
    if place.rows is not None:
        gradient = None if tensor.grad is None else local(tensor.grad)
        is_still = gradient is not None and not gradient.is_sparse and not bool(gradient[place.rows].any())
        if is_still and not any(group.get(key) for key in ("weight_decay", "momentum", "betas")):
            return "their gradient is zero, and the optimizer has neither decay nor momentum: code writes to these rows"
        return "the optimizer moves these rows with the others; mask their gradient, without decay and momentum on them"
    if tensor.grad is not None and bool(tensor.grad.any()):
        return f"an optimizer stepped it with a gradient; set grad = None when freezing, and {_FROM_WHAT_TRAINS}"
    if group.get("weight_decay"):
        return f"weight decay moves a parameter whose gradient is zero; {_FROM_WHAT_TRAINS}"
    if group.get("momentum") or group.get("betas"):
        return f"momentum moves a parameter whose gradient is zero; {_FROM_WHAT_TRAINS}"
    return f"an optimizer holds it and stepped; {_FROM_WHAT_TRAINS}"


def _of_a_write(watched: Watched, content: Tensor) -> str:
    """What wrote to a tensor that no watched optimizer holds, read off the bytes and the signs."""
    before = watched.original
    if is_sparse(watched.tensor):
        return "its elements were written, or others added; leave frozen tensors alone"
    if before.shape != content.shape or before.dtype != content.dtype:
        return "its shape or type was changed (.data, .half(), .to()) after the freeze; convert before"
    if (narrow := _narrower(before, content)) is not None:
        return f"it went through {narrow} and back (.half() or .bfloat16(), then .float()); leave frozen weights alone"
    if bool(content.isnan().any()) and not bool(before.isnan().any()):
        return "not-a-number was written outside the watched optimizers; look for the overflow, or the code that writes"
    if torch.equal(_wide(before), _wide(content)):
        return "only the sign of zeros changed, as by a multiplication or a conversion; do not write to frozen weights"
    if torch.equal(_sorted(before), _sorted(content)):
        return "its elements were permuted in place; permute before the freeze"
    if (factor := _common_factor(before, content)) is not None:
        return (
            f"every element was multiplied by {factor:.6g}, as weight decay does; an optimizer that is not watched, or"
            f" code, scales it: {_FROM_WHAT_TRAINS}"
        )
    if watched.was_moved():
        return "its data was replaced (.data = ..., .to(), .half()) outside the optimizers; do it before the freeze"
    if not watched.was_written():
        return (
            "written past torch's count (.data, a numpy alias, a fused optimizer not watched); write before the freeze"
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
