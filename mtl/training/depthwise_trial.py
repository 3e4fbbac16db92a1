"""A short trial at the start of a run: which depthwise convolutions get their weight gradient as shifted products."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mtl.config import RunConfig
from mtl.data import Batch
from mtl.model.depthwise import depthwise_layers, use_products
from mtl.model.prefix.trace import no_side_effects
from mtl.phases.setup import ModelSetup
from mtl.runtime.console import logger
from mtl.runtime.text import shorten

# Products are taken if they are this many times as fast: so much is no accident of the moment, and a run on the same
# machine takes the same ones.
_CLEARLY = 2
# What takes less, in seconds, is not worth another rounding.
_WORTH = 5e-4
_REPEATS = 6


def choose_depthwise(model_setup: ModelSetup, config: RunConfig, batch: Batch) -> Literal["torch", "auto"] | list[str]:
    """The choice of `depthwise: auto`; any other setting as it is. The model is left as it was.

    Args:
        model_setup: The model, on its device, in the layout that it will train in.
        config: With the layout and precision chosen.
        batch: Training images, on the same device.
    """
    if config.depthwise != "auto":
        return config.depthwise
    plans = [phase.freeze.plan for phase in model_setup.phases if not phase.config.evaluate_only]
    trained = {name for plan in plans for name in plan.names.trainable}
    layers = {name: layer for name, layer in depthwise_layers(model_setup.root).items() if f"{name}.weight" in trained}
    if not layers or not _is_for(config, batch.device):
        return "torch"
    seconds = _time(model_setup, layers, batch)
    chosen = [name for name, (plain, own) in seconds.items() if plain > _WORTH and plain > _CLEARLY * own]
    if chosen:
        best = max(chosen, key=lambda name: seconds[name][0] - seconds[name][1])
        plain, own = (1e3 * taken for taken in seconds[best])
        logger.info(
            f"depthwise: weight gradients as shifted products in {len(chosen)} of {len(layers)} layers"
            f" ({shorten(chosen, 3)}); {best} {own:.1f} ms instead of {plain:.1f} ms"
        )
    else:
        logger.info(f"depthwise: weight gradients by torch in all of {len(layers)} layers: the fastest here")
    return chosen or "torch"


def set_depthwise(model_setup: ModelSetup, config: RunConfig, device: torch.device) -> None:
    """Sets the layers that `depthwise` names, of a model that has them."""
    if not isinstance(config.depthwise, list) or depthwise_layers(model_setup.root).keys().isdisjoint(config.depthwise):
        return
    if not _is_for(config, device):
        logger.warning("depthwise: products are for fp32 on a CPU, not compiled; torch computes the gradients here")
        return
    use_products(model_setup.root, config.depthwise)


def _is_for(config: RunConfig, device: torch.device) -> bool:
    return (
        device.type == "cpu"
        and config.precision == "fp32"
        and not config.compile
        and config.distributed.strategy != "fsdp2"
    )


def _time(model_setup: ModelSetup, layers: dict[str, nn.Conv2d], batch: Batch) -> dict[str, tuple[float, float]]:
    """Seconds of each layer's weight gradient by torch, and as products; layers of one shape are timed once."""
    by_shape: dict[Any, tuple[float, float]] = {}
    seconds: dict[str, tuple[float, float]] = {}

    def hook(name: str) -> Callable[..., None]:
        def time_both(layer: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            (images,) = inputs
            geometry = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, type(layer))
            shape = (images.shape, images.stride(), geometry)
            if shape not in by_shape:
                by_shape[shape] = _time_layer(layer, images.detach(), torch.ones_like(output))
            seconds[name] = by_shape[shape]

        return time_both

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        with no_side_effects(model_setup.model, batch.device), torch.no_grad():
            model_setup.model(batch.images)
    finally:
        for handle in handles:
            handle.remove()
    return seconds


def _time_layer(layer: nn.Conv2d, images: Tensor, gradient: Tensor) -> tuple[float, float]:
    """The shortest of some trials, by torch and as products; the layer is torch's afterwards."""
    alone, outputs = nn.Sequential(layer), []
    for names in ((), ("0",), ()):
        use_products(alone, names)
        with torch.enable_grad():
            outputs.append(layer.forward(images))
    taken: tuple[list[float], list[float]] = [], []
    for _ in range(1 + _REPEATS):
        # In turn, so that other work on the machine meets both.
        for output, each in zip(outputs, taken, strict=False):
            started = time.perf_counter()
            torch.autograd.grad(output, layer.weight, gradient, retain_graph=True)
            each.append(time.perf_counter() - started)
    # The first pass also allocates memory and picks kernels.
    return min(taken[0][1:]), min(taken[1][1:])
