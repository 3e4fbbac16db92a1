"""A short trial at the start of a run: which memory layout and which number format make its steps fastest here."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from itertools import product
from statistics import median
from typing import Literal

import torch
from torch import Tensor

from mtl.data import Batch
from mtl.model.network import MEMORY_FORMATS
from mtl.model.prefix.trace import no_side_effects
from mtl.phases.enter import entered
from mtl.phases.resolve import Phase
from mtl.phases.setup import ModelSetup

Layout = Literal["contiguous", "channels_last"]
Precision = Literal["fp32", "bf16", "fp16"]
AUTOCAST = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# A candidate that takes this many times as long as the best so far is not tried any further.
_HOPELESS = 3


@dataclass(frozen=True)
class Choice:
    """The memory layout and precision of a run.

    Attributes:
        memory_format: Layout of weights and activations.
        precision: The type of the forward.
        why: What was measured, in words; empty if nothing was left to choose.
    """

    memory_format: Layout
    precision: Precision
    why: str


def autocast_for(precision: str, device: torch.device) -> torch.autocast:
    """The context in which a model's forward runs."""
    return torch.autocast(device.type, AUTOCAST[precision], enabled=precision != "fp32")


def choose(model_setup: ModelSetup, batch: Batch, device: torch.device, excluded: Collection[str] = ()) -> Choice:
    """Times forward and backward of the longest phase on one batch, in everything that `auto` leaves open.

    Losses have to be finite. Weights, buffers and random numbers are left as they were, the model in the chosen layout.

    Args:
        model_setup: The model, on its device.
        batch: Training images, there as well.
        device: Where they are.
        excluded: Layouts and precisions that `auto` is not to take.
    """
    config = model_setup.config
    layouts: list[Layout] = ["contiguous", "channels_last"]
    precisions: list[Precision] = ["fp32", "bf16", "fp16"] if device.type == "cuda" else ["fp32", "bf16"]
    layouts = [each for each in layouts if each not in excluded]
    precisions = [each for each in precisions if each not in excluded]
    layouts = layouts if config.memory_format == "auto" else [config.memory_format]
    precisions = precisions if config.precision == "auto" else [config.precision]
    if len(layouts) == len(precisions) == 1:
        return Choice(layouts[0], precisions[0], "")
    phase = max(model_setup.phases, key=lambda phase: phase.num_steps)
    seconds: dict[tuple[Layout, Precision], float] = {}
    with entered(model_setup.root, phase.freeze.plan), no_side_effects(model_setup.model, device):
        for layout, precision in product(layouts, precisions):
            lay_out(model_setup, layout)
            taken = _time(model_setup, phase, batch, precision, min(seconds.values(), default=float("inf")))
            if taken is not None:
                seconds[layout, precision] = taken
    # If no candidate gave a finite loss, the first one is taken: training then stops at its first step with that error.
    layout, precision = min(seconds, key=seconds.__getitem__, default=(layouts[0], precisions[0]))
    lay_out(model_setup, layout)
    others = ", ".join(f"{' '.join(key)} {1e3 * taken:.0f} ms" for key, taken in seconds.items())
    return Choice(layout, precision, f"{layout}, {precision}: the fastest step of phase {phase.name!r} here ({others})")


def lay_out(model_setup: ModelSetup, layout: Layout) -> None:
    """Puts weights and activations of a model into a memory layout."""
    model_setup.model.memory_format = MEMORY_FORMATS[layout]
    model_setup.model.to(memory_format=MEMORY_FORMATS[layout])


def _time(model_setup: ModelSetup, phase: Phase, batch: Batch, precision: Precision, best: float) -> float | None:
    """Median seconds of a forward and backward; None if a loss is not finite."""
    taken = []
    for _ in range(4):
        started = time.perf_counter()
        with autocast_for(precision, batch.device):
            outputs = model_setup.model(batch.images, phase.tasks)
        losses: list[Tensor] = [model_setup.tasks[name].loss(outputs[name], batch.labels[name]) for name in phase.tasks]
        total = torch.stack(losses).sum()
        if total.requires_grad:
            torch.autograd.backward([total])
        if not bool(total.isfinite()):
            return None
        taken.append(time.perf_counter() - started)
        if taken[-1] > 10 * _HOPELESS * best or (len(taken) > 1 and taken[-1] > _HOPELESS * best):
            break
    # The first pass also allocates memory and picks kernels.
    return median(taken[1:] or taken)
