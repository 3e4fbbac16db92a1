"""`MultiTaskModel`: one trunk, one head per task."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from einops import rearrange
from torch import Tensor, nn

from mtl.config import TrunkConfig
from mtl.model.heads import build_head
from mtl.model.trunk import feature_shape, pyramid_levels, read_features
from mtl.model.weights import PACKAGED_TRUNK, WeightsError, file_weights, hub_or_cache, load_into, packaged_weights
from mtl.tasks.base import Task


class Normalize(nn.Module):
    """From stored images to what the trunk was trained on."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("scale", 1 / (255 * torch.tensor(std)).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", (-torch.tensor(mean) / torch.tensor(std)).view(1, -1, 1, 1), persistent=False)
        self.scale: Tensor
        self.shift: Tensor

    def forward(self, images: Tensor) -> Tensor:
        """Args:
            images: "b h w c", uint8, c is 3, or 1 for grey.

        Returns:
            "b 3 h w", float32, channels_last in memory, as the images are stored.
        """
        return rearrange(images, "b h w c -> b c h w").to(self.scale.dtype) * self.scale + self.shift


class MultiTaskModel(nn.Module):
    """A shared timm trunk and a head per task.

    Attributes:
        trunk: The timm module itself: its own parameter names follow `trunk.`.
        heads: The heads by task name: `heads.<task>.`.
        normalize: The trunk's input normalisation.
    """

    def __init__(self, config: TrunkConfig, tasks: Mapping[str, Task], image_size: int) -> None:
        """Args:
            config: The trunk.
            tasks: The tasks by name; each decides the form of its head.
            image_size: Height and width of the images, in pixels.

        Raises:
            ValueError: timm knows no such trunk, or cannot build it with these options and this size.
            WeightsError: The weights cannot be had, or do not fit.
        """
        super().__init__()
        trunk = build_trunk(config, image_size)
        trained_on: Any = trunk.pretrained_cfg
        self.normalize = Normalize(trained_on["mean"], trained_on["std"])
        self.trunk = trunk
        dense = any(task.output == "dense" for task in tasks.values())
        self.levels = pyramid_levels(trunk) if dense else []
        self.pooled = any(task.output == "vector" for task in tasks.values())
        shape = feature_shape(trunk, self.levels, image_size)
        self.heads = nn.ModuleDict(
            {name: build_head(task.output, shape, task.num_outputs) for name, task in tasks.items()}
        )
        # Set by whoever freezes the whole trunk: it is then run without recording for a backward that never comes.
        self.trunk_is_frozen = False

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Args:
            images: "b h w c", uint8.

        Returns:
            By task, "b c h w" from dense heads and "b c" from vector heads.
        """
        size = (images.shape[1], images.shape[2])
        x = self.normalize(images)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.trunk_is_frozen):
            features = read_features(self.trunk, x, self.levels, self.pooled)
        return {name: head(features, size) for name, head in self.heads.items()}


def build_trunk(config: TrunkConfig, image_size: int) -> nn.Module:
    """Makes a timm model without a classifier, with the weights that `trunk.weights` names.

    Raises:
        ValueError: timm knows no such model, or cannot build it with these options and this size.
        WeightsError: The weights cannot be had, or do not fit.
    """
    if not timm.is_model(config.name):
        raise ValueError(f"trunk.name: timm knows no model {config.name!r}{_nearest(config.name)}")
    options = dict(config.options)
    # Models with a fixed number of tokens are told the size; the others take any.
    if timm.models.get_pretrained_cfg_value(config.name, "fixed_input_size"):
        options.setdefault("img_size", image_size)
    if config.weights == "packaged" and config.name != PACKAGED_TRUNK:
        raise WeightsError(
            f"trunk.weights: packaged holds weights of {PACKAGED_TRUNK} only, not of {config.name};"
            " other choices: hub, none, or the path of a weights file"
        )
    # Read before the model is built: a missing file should not cost the time of building.
    state = None
    if config.weights == "packaged":
        state = packaged_weights()
    elif config.weights not in ("hub", "none"):
        state = file_weights(Path(config.weights))
    with hub_or_cache() if config.weights == "hub" else nullcontext():
        trunk = _create(config.name, pretrained=config.weights == "hub", options=options)
    if state is not None:
        load_into(trunk, state, config.weights)
    return trunk


def _create(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    try:
        trunk: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"trunk.options: timm cannot build {name!r} with {options}: {error}") from error
    return trunk


def _nearest(name: str) -> str:
    models = timm.list_models()
    near = (
        get_close_matches(name, models, n=3, cutoff=0.6) or [m for m in models if m.startswith(name.split("_")[0])][:3]
    )
    return f"; nearest: {', '.join(near)}" if near else ""
