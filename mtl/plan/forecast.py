"""What a phase could keep of the trunk, told from shapes alone."""

from __future__ import annotations

import torch

from mtl.blueprint import Blueprint
from mtl.data import num_images
from mtl.freeze import enforce
from mtl.model.prefix import Prefix, PrefixError
from mtl.phases import Phase, num_passes
from mtl.plan.records import KeptPlan

_NUM_IMAGES = 3


def forecast(blueprint: Blueprint, index: int) -> KeptPlan:
    """What is computed once in a phase, if keeping pays there; whether it does is measured when the phase begins.

    Args:
        blueprint: A model without weights, and its phases.
        index: The phase's place.
    """
    config, model, phase = blueprint.config, blueprint.model, blueprint.phases[index]
    passes = num_passes(blueprint.phases[index:], 0)
    why_not = _why_not(blueprint, phase, passes)
    if why_not:
        return KeptPlan(why_not=why_not)
    enforce(blueprint.root, phase.freeze.plan)
    size = config.data.image_size
    device = next(model.parameters()).device
    blank = torch.zeros(_NUM_IMAGES, size, size, 3, dtype=torch.uint8, device=device)
    try:
        prefix = Prefix.forecast(model.trunk, model.read, model.prepare(blank))
    except PrefixError as error:
        return KeptPlan(why_not=str(error))
    narrow = {"float32": 1.0}.get(config.cache.dtype, 0.5)
    per_image = int(prefix.bytes_per_image * narrow)
    views = config.cache.views or 1 if config.data.augment is not None else 1
    num_train, num_val = num_images(config.data)
    return KeptPlan(len(prefix.modules), per_image, per_image * (views * num_train + num_val))


def _why_not(blueprint: Blueprint, phase: Phase, passes: float) -> str:
    config = blueprint.config
    mode = phase.config.cache or config.cache.mode
    if mode == "off":
        return "cache is off"
    if config.data.augment is not None and config.cache.views is None:
        return "every epoch sees the images augmented anew"
    return "for no more than one pass over the data" if mode == "auto" and passes <= 1 else ""
