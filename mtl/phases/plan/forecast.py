"""The features that a phase could keep, found from shapes alone."""

from __future__ import annotations

from functools import partial

import torch

from mtl.model.prefix import Prefix, PrefixError
from mtl.phases.enter import entered
from mtl.phases.plan.records import KeptPlan
from mtl.phases.reuse import most_in_a_row, num_passes, num_views, why_not_kept
from mtl.phases.setup import ModelSetup

_NUM_IMAGES = 3


def forecast(model_setup: ModelSetup, index: int, world_size: int) -> KeptPlan:
    """The part of the trunk that a phase could compute once; whether keeping it pays is measured when the phase begins.

    Args:
        model_setup: A model without weights, and its phases.
        index: The phase's place.
        world_size: Processes that train.
    """
    config, model, phase = model_setup.config, model_setup.model, model_setup.phases[index]
    passes = num_passes(model_setup.phases[index:], 0) / num_views(config)
    if why_not := why_not_kept(config, phase, passes):
        return KeptPlan(why_not=why_not)
    try:
        with entered(model_setup.root, phase.freeze.plan):
            read = partial(model.read, tasks=model_setup.labelled)
            prefix = Prefix.forecast(model.trunk, read, model.prepare(model.example_inputs(_NUM_IMAGES)))
    except PrefixError as error:
        return KeptPlan(why_not=str(error))
    if why_not := model.why_not_cut(prefix, phase.tasks, model_setup.labelled):
        return KeptPlan(why_not=why_not)
    per_image = prefix.bytes_in(getattr(torch, config.cache.dtype))
    num_train, num_val = model_setup.source.num_images
    size = per_image * (num_views(config) * num_train + num_val)
    in_a_row = world_size == 1 and not prefix.modules and most_in_a_row(config, phase, per_image) > 0
    return KeptPlan(len(prefix.modules), per_image, size, in_a_row=in_a_row)
