"""Builds the trunk with timm, and blames the setting that it does not fit."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mtl.config import SettingError, TrunkConfig
from mtl.model.grad_checkpointing import enable_grad_checkpointing
from mtl.model.timm_models import timm
from mtl.model.trunk import FeatureShape, feature_shape, pyramid_levels
from mtl.model.weights import (
    PACKAGED_TRUNK,
    WeightsError,
    check_tag,
    file_weights,
    hub_or_cache,
    load_into,
    packaged_weights,
)
from mtl.runtime.console import first_line
from mtl.runtime.text import hint


def build_trunk(config: TrunkConfig, image_size: tuple[int, int]) -> nn.Module:
    """Builds a timm model without a classifier, with the weights that `trunk.weights` names.

    Raises:
        SettingError: timm knows no such model, or cannot build it with these options and this size.
        WeightsError: The weights are not available, or do not fit.
    """
    if not timm.is_model(config.name):
        near = hint(config.name, timm.list_models(), most=3, cutoff=0.6)
        raise SettingError("trunk.name", f"timm knows no model {config.name!r}{near}")
    check_tag(config.name)
    options = trunk_options(config, image_size)
    if config.weights == "packaged" and config.name != PACKAGED_TRUNK:
        raise WeightsError(
            f"packaged holds weights of {PACKAGED_TRUNK} only, not of {config.name};"
            " other choices: hub, none, or the path of a weights file"
        )
    # Read before the model is built, so that a missing file fails at once.
    state = None
    if config.weights == "packaged":
        state = packaged_weights()
    elif config.weights not in ("hub", "none"):
        state = file_weights(Path(config.weights))
    try:
        with hub_or_cache() if config.weights == "hub" else nullcontext():
            trunk = _create(config.name, pretrained=config.weights == "hub", options=options)
    except _UnfitError as error:
        raise _blamed(error, config, image_size, dense=False) from error
    if state is not None:
        load_into(trunk, state, config.weights)
    if config.checkpointing:
        try:
            enable_grad_checkpointing(trunk)
        except (AttributeError, AssertionError, NotImplementedError) as error:
            message = f"timm does not support it for {config.name!r}; leave it out"
            raise SettingError("trunk.checkpointing", message) from error
    return trunk


# timm and torch raise them for a user's options and sizes, when a model is built or first run.
_TIMM_ERRORS = (TypeError, ValueError, AssertionError, RuntimeError, AttributeError, IndexError, KeyError)


class _UnfitError(SettingError):
    """A trunk that cannot be built or run, because of its options or the size of the images."""


def _create(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    try:
        trunk: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
    except _TIMM_ERRORS as error:
        if pretrained and isinstance(error, RuntimeError):
            raise  # no weights for this architecture: hub_or_cache reports it
        raise _UnfitError("trunk.options", f"timm cannot build {name!r} with {options}: {error}") from error
    return trunk


def trunk_options(config: TrunkConfig, image_size: tuple[int, int]) -> dict[str, Any]:
    """The options for timm; models with a fixed number of tokens need the image size, others take any."""
    for key, instead in (("pretrained", "set trunk.weights instead"), ("num_classes", "the heads have the classes")):
        if key in config.options:
            raise SettingError("trunk.options", f"{key!r} is no option here: {instead}")
    is_fixed = timm.models.get_pretrained_cfg_value(config.name, "fixed_input_size")
    return ({"img_size": image_size} if is_fixed else {}) | config.options


def input_channels(config: TrunkConfig) -> int:
    """Channels of the images that a trunk takes."""
    channels: int = config.options.get("in_chans", 3)
    return channels


def features_of(
    trunk: nn.Module, dense: bool, image_size: tuple[int, int], config: TrunkConfig
) -> tuple[list[int], FeatureShape]:
    """The levels of a trunk that dense heads read, and the shape of all features.

    Args:
        trunk: As `build_trunk` has built it.
        dense: Whether some head reads its pyramid.
        image_size: Height and width of the images, in pixels.
        config: The trunk's settings.

    Raises:
        SettingError: The trunk does not run with these options and this size.
    """
    try:
        return _probe(trunk, dense, image_size, config)
    except _UnfitError as error:
        raise _blamed(error, config, image_size, dense) from error


def _probe(
    trunk: nn.Module, dense: bool, image_size: tuple[int, int], config: TrunkConfig
) -> tuple[list[int], FeatureShape]:
    try:
        levels = pyramid_levels(trunk) if dense else []
        return levels, feature_shape(trunk, levels, image_size, input_channels(config))
    except _TIMM_ERRORS as error:
        key = "trunk.options" if config.options else "trunk.name"
        raise _UnfitError(
            key,
            f"{config.name!r} with options {config.options} gives no features for images of"
            f" {image_size[0]} x {image_size[1]} pixels: {first_line(error)}",
        ) from error


# Patch sizes, window sizes and strides of nearly all trunks are among these, or divide one of them.
_GRIDS = (14, 16, 32, 64, 256)


def _blamed(error: _UnfitError, config: TrunkConfig, image_size: tuple[int, int], dense: bool) -> SettingError:
    """The error; blames the image size, with the nearest sizes that fit, if the trunk can run with another size."""
    usual = timm.models.get_pretrained_cfg_value(config.name, "input_size")
    if usual is None or not _takes(config, (usual[-2], usual[-1]), dense):
        return error
    grids = [grid for grid in _GRIDS if grid <= min(image_size)]
    below = sorted({_on_grid(image_size, grid, 0) for grid in grids} - {image_size}, reverse=True)
    above = sorted({_on_grid(image_size, grid, 1) for grid in _GRIDS})
    nearest = (next((size for size in sizes if _takes(config, size, dense)), None) for sizes in (below, above))
    fitting = sorted({*(size for size in nearest if size is not None), (usual[-2], usual[-1])})
    return SettingError(
        "data.image_size",
        f"{config.name!r} takes no images of {image_size[0]} x {image_size[1]} pixels; sizes that fit:"
        f" {', '.join(map(_size_text, fitting))} ({error.message})",
    )


def _on_grid(image_size: tuple[int, int], grid: int, more: int) -> tuple[int, int]:
    """The size in whole cells of a grid: as many as fit, or some more."""
    height, width = ((side // grid + more) * grid for side in image_size)
    return height, width


def _size_text(size: tuple[int, int]) -> str:
    """A size as a configuration writes it."""
    return str(size[0]) if size[0] == size[1] else str(list(size))


def _takes(config: TrunkConfig, image_size: tuple[int, int], dense: bool) -> bool:
    """Whether a trunk can be built for a size and gives features; tried on the meta device."""
    try:
        with torch.device("meta"):
            trunk = _create(config.name, pretrained=False, options=trunk_options(config, image_size))
            _probe(trunk, dense, image_size, config)
    except _UnfitError:
        return False
    return True
