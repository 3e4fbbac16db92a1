"""`MultiTaskModel`: one trunk, one head per task."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
from einops import rearrange
from torch import Tensor, nn

from mtl.config import SettingError, TrunkConfig
from mtl.model.grad_checkpointing import enable_grad_checkpointing
from mtl.model.heads import DenseHead, VectorHead, build_head
from mtl.model.prefix import Prefix
from mtl.model.trunk import Features, FeatureShape, feature_shape, pyramid_levels, read_features
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
from mtl.tasks.base import Task

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Normalize(nn.Module):
    """Normalises stored images with the mean and std of the trunk's pretraining."""

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
            "b 3 h w", float32, channels_last in memory, since the images are stored so; callers may convert it.
        """
        return rearrange(images, "b h w c -> b c h w").to(self.scale.dtype) * self.scale + self.shift


class MultiTaskModel(nn.Module):
    """A shared timm trunk and a head per task.

    Attributes:
        trunk: The timm module; its parameters are named `trunk.<timm's name>`.
        heads: The heads by task name; their parameters are named `heads.<task>.<name>`.
        normalize: The trunk's input normalisation.
    """

    def __init__(
        self,
        config: TrunkConfig,
        tasks: Mapping[str, Task],
        image_size: int,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        """Args:
            config: The trunk.
            tasks: The tasks by name; each determines its head.
            image_size: Height and width of the images, in pixels.
            memory_format: Layout of weights and activations.

        Raises:
            SettingError: timm knows no such trunk, or it cannot be built or run with these options and this size.
            WeightsError: The weights are not available, or do not fit.
        """
        super().__init__()
        trunk = build_trunk(config, image_size)
        dense = any(task.output == "dense" for task in tasks.values())
        try:
            self.levels, shape = _probe(trunk, dense, image_size, config)
        except _UnfitError as error:
            raise _blamed(error, config, image_size, dense) from error
        trained_on: Any = trunk.pretrained_cfg
        self.normalize = Normalize(trained_on["mean"], trained_on["std"])
        self.trunk = trunk
        heads = {name: build_head(task.output, shape, task.num_outputs) for name, task in tasks.items()}
        self.heads = nn.ModuleDict(heads)
        self.memory_format = memory_format
        self.image_size = image_size
        self.to(memory_format=memory_format)
        # Compiled methods by name.
        self._compiled: dict[str, Callable[..., Any]] = {}

    @property
    def trunk_is_frozen(self) -> bool:
        """Whether no parameter of the trunk requires a gradient: it then runs without recording for a backward."""
        # Asked in every forward: `parameters()`, which spells out every module's name, takes five times as long.
        modules: list[nn.Module | None] = [self.trunk]
        while modules:
            module = modules.pop()
            if module is not None:
                for parameter in module._parameters.values():
                    if parameter is not None and parameter.requires_grad:
                        return False
                modules.extend(module._modules.values())
        return True

    def example_inputs(self, num_images: int, device: torch.device | str | None = None) -> Tensor:
        """Blank images of the size that the model was built for.

        Args:
            num_images: How many.
            device: Where they are; with the model's parameters if not given.

        Returns:
            "b h w 3", uint8, all 0.
        """
        shape = (num_images, self.image_size, self.image_size, 3)
        return torch.zeros(shape, dtype=torch.uint8, device=device or next(self.parameters()).device)

    def forward(self, images: Tensor, tasks: Collection[str] | None = None) -> dict[str, Tensor]:
        """Args:
            images: "b h w c", uint8.
            tasks: The tasks whose heads are run; all if not given.

        Returns:
            By task, "b c h w" from dense heads and "b c" from vector heads.
        """
        return self.decode(self.encode(images, tasks), (images.shape[1], images.shape[2]), tasks)

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies and pickles: without compiled code, which is bound to this model; layout as text."""
        layout = next(name for name, known in MEMORY_FORMATS.items() if known == self.memory_format)
        return self.__dict__ | {"_compiled": {}, "memory_format": layout}

    def __setstate__(self, state: dict[str, Any]) -> None:
        layout = MEMORY_FORMATS[state["memory_format"]]
        super().__setstate__(state | {"memory_format": layout})  # type: ignore[no-untyped-call]  # torch's

    def recompile(self) -> None:
        """Drops code compiled for another freeze; trunk and heads are compiled at their next call."""
        torch.compiler.reset()
        self._compiled = {"read": torch.compile(self.read), "decode": torch.compile(self._decode)}

    def encode(self, images: Tensor, tasks: Collection[str] | None = None) -> Features:
        """The trunk's features that the heads of some tasks read.

        Args: as for `forward`.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.trunk_is_frozen):
            features: Features = self._compiled.get("read", self.read)(self.prepare(images), tasks)
            return features

    def prepare(self, images: Tensor) -> Tensor:
        """The trunk's input, "b 3 h w", in the model's layout: convolutions compute in the layout of their input."""
        prepared: Tensor = self.normalize(images).contiguous(memory_format=self.memory_format)
        return prepared

    def read(self, prepared: Tensor, tasks: Collection[str] | None = None) -> Features:
        """`encode` after `prepare`."""
        dense, pooled = self.reads(tasks)
        return read_features(self.trunk, prepared, self.levels if dense else [], pooled)

    def reads(self, tasks: Collection[str] | None) -> tuple[bool, bool]:
        """Whether the heads of some tasks read the trunk's pyramid, and its pooled vector."""
        heads = self._heads_of(tasks).values()
        return any(isinstance(head, DenseHead) for head in heads), any(isinstance(head, VectorHead) for head in heads)

    def why_not_cut(self, prefix: Prefix, tasks: Collection[str]) -> str:
        """Why a phase of some tasks cannot run only the trunk after a prefix for all tasks; empty if it can."""
        if prefix.modules and self.reads(tasks) != self.reads(None):
            # Training would run the rest of the trunk for features that only validation reads.
            return "the phase's tasks read other features of the trunk than all tasks do"
        return ""

    def decode(
        self, features: Features, size: tuple[int, int], tasks: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        """The heads' outputs.

        Args:
            features: At least the features that these heads read.
            size: Height and width of the images, in pixels.
            tasks: As for `forward`.

        Returns:
            As `forward`.
        """
        outputs: dict[str, Tensor] = self._compiled.get("decode", self._decode)(features, size, tasks)
        return outputs

    def _decode(self, features: Features, size: tuple[int, int], tasks: Collection[str] | None) -> dict[str, Tensor]:
        return {name: head(features, size) for name, head in self._heads_of(tasks).items()}

    def _heads_of(self, tasks: Collection[str] | None) -> dict[str, nn.Module]:
        return {name: head for name, head in self.heads.items() if tasks is None or name in tasks}


def build_trunk(config: TrunkConfig, image_size: int) -> nn.Module:
    """Builds a timm model without a classifier, with the weights that `trunk.weights` names.

    Raises:
        SettingError: timm knows no such model, or cannot build it with these options and this size.
        WeightsError: The weights are not available, or do not fit.
    """
    if not timm.is_model(config.name):
        near = hint(config.name, timm.list_models(), most=3, cutoff=0.6)
        raise SettingError("trunk.name", f"timm knows no model {config.name!r}{near}")
    check_tag(config.name)
    options = _options(config, image_size)
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


def _options(config: TrunkConfig, image_size: int) -> dict[str, Any]:
    """The options for timm; models with a fixed number of tokens need the image size, others take any."""
    for key, instead in (("pretrained", "set trunk.weights instead"), ("num_classes", "the heads have the classes")):
        if key in config.options:
            raise SettingError("trunk.options", f"{key!r} is no option here: {instead}")
    is_fixed = timm.models.get_pretrained_cfg_value(config.name, "fixed_input_size")
    return ({"img_size": image_size} if is_fixed else {}) | config.options


def _probe(trunk: nn.Module, dense: bool, image_size: int, config: TrunkConfig) -> tuple[list[int], FeatureShape]:
    """The levels that dense heads read, and the shape of all features."""
    try:
        levels = pyramid_levels(trunk) if dense else []
        return levels, feature_shape(trunk, levels, image_size)
    except _TIMM_ERRORS as error:
        key = "trunk.options" if config.options else "trunk.name"
        raise _UnfitError(
            key,
            f"{config.name!r} with options {config.options} gives no features for images of"
            f" {image_size} x {image_size} pixels with 3 channels: {first_line(error)}",
        ) from error


# Patch sizes, window sizes and strides of nearly all trunks are among these, or divide one of them.
_GRIDS = (14, 16, 32, 64, 256)


def _blamed(error: _UnfitError, config: TrunkConfig, image_size: int, dense: bool) -> SettingError:
    """The error; blames the image size, with the nearest sizes that fit, if the trunk can run with another size."""
    usual = timm.models.get_pretrained_cfg_value(config.name, "input_size")
    if usual is None or not _takes(config, usual[-1], dense):
        return error
    below = sorted({image_size // grid * grid for grid in _GRIDS} - {0, image_size}, reverse=True)
    above = sorted({(image_size // grid + 1) * grid for grid in _GRIDS})
    nearest = (next((size for size in sizes if _takes(config, size, dense)), None) for sizes in (below, above))
    fitting = sorted({*(size for size in nearest if size is not None), usual[-1]})
    return SettingError(
        "data.image_size",
        f"{config.name!r} takes no images of {image_size} x {image_size} pixels; sizes that fit:"
        f" {', '.join(map(str, fitting))} ({error.message})",
    )


def _takes(config: TrunkConfig, image_size: int, dense: bool) -> bool:
    """Whether a trunk can be built for a size and gives features; tried on the meta device."""
    try:
        with torch.device("meta"):
            trunk = _create(config.name, pretrained=False, options=_options(config, image_size))
            _probe(trunk, dense, image_size, config)
    except _UnfitError:
        return False
    return True
