"""The most likely cause of each kind of finding, with the fix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import Tensor, nn

from mtl.audit.watch.places import TensorPlace

FROM_TRAINABLE = "build the optimizer from the trainable parameters only"

STALE_GRADIENT = "a gradient left from before the freeze; set grad = None when freezing"
GRADIENT_BY_HAND = (
    "code gave it one (.grad = ..., jac_to_grad, requires_grad on for a while); leave it None on frozen tensors"
)
LATE_FREEZE = "it required a gradient when the loss was computed; enforce the freeze before the forward"
STILL_REQUIRED = "requires_grad was not switched off, or was switched on again after the freeze"
REPLACED = "the module or tensor was replaced after the freeze; replace before, and rebuild the optimizer"
TRAIN_MODE = "a .train() after the freeze; keep the frozen module in eval mode"
BATCH_STATISTICS = (
    "track_running_stats=False has it normalise by each batch, in eval mode too, so that its output is not constant;"
    " keep its running statistics, in eval mode"
)
DROPOUT = "the frozen module is in train mode, so that its output is not constant; keep it in eval mode"
EARLY_OPTIMIZER = f"the optimizer was built before the freeze; {FROM_TRAINABLE}"
ADDED_LATER = (
    "an optimizer received it after the phase began (add_param_group, or one built from all parameters);"
    f" {FROM_TRAINABLE}"
)
LATE_THAW = "thawed after the optimizer was built; rebuild the optimizer when a phase begins"
LEFT_OUT = "the optimizer was built without it; build it from all trainable parameters, or name it in freeze"
ANOTHER_MODEL = (
    "the optimizer holds other tensors of its shape: those of a copy (deepcopy), or from before .to() or a swap; build"
    " it from this model's parameters, last"
)
ADDED = (
    "it was added after the phase began (an adapter, a new layer); add it before, and take it back with !pattern if it"
    " is to train"
)
TRAINED_REPLACED = (
    "it was added after the optimizer was built (a swapped module, a new nn.Parameter, assign=True); rebuild the"
    " optimizer"
)
WHILE_STOPPED = (
    "it was changed while the run was stopped (another checkpoint, an edited file, other weights loaded); resume"
    " from the tensors that were saved with the audit's state"
)
WHILE_STOPPED_OR_BEFORE = (
    "it was changed while the run was stopped, or unobserved shortly before; verify before the state is taken, and"
    " resume from the tensors that were saved with it"
)
FROZEN_DIFFERS = (
    "these ranks loaded other weights, or code wrote to them on some ranks only; load the same on all before the freeze"
)
TRAINED_DIFFERS = (
    "they began with other weights, their gradients were not averaged (no DDP, no_sync() at a step, a parameter that"
    " DDP does not know), or code wrote on some ranks only; broadcast the weights, and average all gradients"
)
SHARED = "a tied or viewed tensor; freeze both names or neither"
TWICE = "two param groups or optimizers step it; give each parameter to one"
HIDDEN = (
    "its module is in a Python list or dictionary, where parameters() does not look; use nn.ModuleList or ModuleDict"
)
PLAIN_TENSOR = "a plain tensor is no parameter, so that parameters() omits it; wrap it in nn.Parameter"
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
    "step() is no longer called, a grad scaler skips every step, or the optimizer was rebuilt; attach the new one too"
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
RECOMPUTED = "a non-persistent buffer was computed again, as caches are; register it as persistent if it is state"
NO_STEP_SEEN = "{number} backwards were observed, but no step"
SWITCHED_OFF = "requires_grad was switched off in mid-phase; end the phase there, and name it in the next one's freeze"
CUT_OFF = (
    "no loss depends on it any more (detached, under no_grad, a task left out); end the phase there, and name it in the"
    " next one's freeze"
)
ZERO_RATE = "its param group has the learning rate 0; give it one, or name it in freeze"
TOO_SMALL = (
    "its updates are smaller than its type can hold, or something writes it back; raise the rate, or use float32"
)

_FLAG = "requires_grad"


def of_flag(tensor: Tensor, modules: Iterable[nn.Module]) -> str | None:
    """Why a requires_grad flag has no effect: it was assigned where torch does not read it.

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
    """Why no optimizer holds a trainable parameter.

    Args:
        tensor: The parameter.
        groups: The param groups of all optimizers.
        model: All tensors of the model.
        was_frozen: Whether it required no gradient earlier.
    """
    mine = {id(each) for each in model}
    strangers = [p for group in groups for p in group["params"] if id(p) not in mine]
    if any(each.shape == tensor.shape for each in strangers):
        return ANOTHER_MODEL
    return LATE_THAW if was_frozen else LEFT_OUT


def of_replacement(place: TensorPlace) -> str:
    """Why a tensor is no longer registered in its place."""
    owner, key = place.owner, place.key
    if key in getattr(owner, "parametrizations", {}):
        return f"a parametrization of {key} was registered after the freeze; register it before"
    for suffix, what in (("_orig", "pruning"), ("_g", "weight norm"), ("_v", "weight norm")):
        if f"{key}{suffix}" in owner._parameters:
            return f"{what} was applied to {key} after the freeze; do it before"
    if key in owner._parameters:
        return (
            "it was registered again after the freeze (load_state_dict(assign=True), a new nn.Parameter); do it before"
        )
    return REPLACED


def of_removal(place: TensorPlace) -> str:
    """Why no tensor has a frozen tensor's name any more."""
    if place.key in getattr(place.owner, "parametrizations", {}) or f"{place.key}_orig" in place.owner._parameters:
        return of_replacement(place)
    return "the module or tensor was deleted, replaced or wrapped after the freeze; do it before"


def of_addition(place: TensorPlace) -> str:
    """Why a tensor was added to the frozen part."""
    if place.key.endswith(("_orig", "_mask")):
        return "pruning was applied after the freeze; do it before"
    return ADDED


def of_copy(follows: bool) -> str:
    """Why the average of a frozen tensor may have changed; `follows` if the tensor itself has."""
    if follows:
        return "it follows the tensor that it averages, which has changed itself; fix that"
    return "the average is not exact for frozen tensors; average trainable parameters only, or by lerp"
