"""The states of the random number generators that a run draws from."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of all generators: Python's, NumPy's, torch's on the CPU, and on the device if that is another one."""
    version, numbers, gauss = random.getstate()
    kind, keys, place, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), place, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def seed_process(seed: int, rank: int) -> None:
    """Seeds all generators, each rank of a run with another seed."""
    own = (seed + 0x9E3779B1 * rank) % 2**32
    random.seed(own)
    np.random.seed(own)
    torch.manual_seed(own)


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Restores all generators; one of a device that was not used then keeps its state."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, place, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), place, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def rng_unchanged(device: torch.device) -> Iterator[None]:
    """Puts all streams back when the block ends: whatever is drawn inside leaves no trace."""
    state = random_state(device)
    try:
        yield
    finally:
        set_random_state(state, device)


@contextmanager
def torch_seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch draws from a seed inside the block, on the CPU and a device, and afterwards as if there had been none."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    states = [generator.get_state() for generator in generators]
    # `torch.manual_seed` would seek every kind of device, which takes as long as a small step.
    for generator in generators:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
