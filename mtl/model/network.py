"""`MultiTaskModel`: one trunk, one head per task."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from mtl.config import HeadConfig, TrunkConfig
from mtl.model.build import build_trunk, features_of, input_channels
from mtl.model.heads import Head, build_head, class_of, share_weights, try_out
from mtl.model.heads.joined import joinable, joined_outputs
from mtl.model.prefix import Prefix
from mtl.model.trunk import Features, Kind, in_eval_mode, read_features, size_of
from mtl.tasks.base import Task

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Normalize(nn.Module):
    """Normalises stored images with the mean and std of the trunk's pretraining."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], persistent: bool = False) -> None:
        super().__init__()
        self.register_buffer("scale", 1 / (255 * torch.tensor(std)).view(1, -1, 1, 1), persistent)
        self.register_buffer("shift", (-torch.tensor(mean) / torch.tensor(std)).view(1, -1, 1, 1), persistent)
        self.scale: Tensor
        self.shift: Tensor

    def forward(self, images: Tensor) -> Tensor:
        """Args:
            images: "b h w c", uint8 or float32 from 0 to 255; where the trunk takes 3 channels, c is 3, or 1 for grey.

        Returns:
            "b c h w", float32, channels_last in memory, since the images are stored so; callers may convert it.
        """
        return rearrange(images, "b h w c -> b c h w").to(self.scale.dtype) * self.scale + self.shift


def statistics_of(trained_on: Mapping[str, Any], channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of each channel; those of other channels than a trunk was trained on are their means."""
    mean, std = trained_on["mean"], trained_on["std"]
    if len(mean) == channels:
        return mean, std
    return (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels


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
        image_size: int | tuple[int, int],
        memory_format: torch.memory_format = torch.contiguous_format,
        heads: Mapping[str, HeadConfig | None] | None = None,
    ) -> None:
        """Args:
            config: The trunk.
            tasks: The tasks by name.
            image_size: Height and width of the images, in pixels; a single number is both.
            memory_format: Layout of weights and activations.
            heads: The heads by task; a task without one has the default head for its kind of output.

        Raises:
            SettingError: timm knows no such trunk, or it cannot be built or run with these options and this size; or
                a head does not fit its task or the trunk.
            WeightsError: The weights are not available, or do not fit.
        """
        super().__init__()
        chosen = {name: (heads or {}).get(name) for name in tasks}
        kinds = {name: class_of(chosen[name], task.output, name) for name, task in tasks.items()}
        trunk = build_trunk(config, size_of(image_size))
        dense = any("pyramid" in kind.reads for kind in kinds.values())
        self.levels, shape = features_of(trunk, dense, size_of(image_size), config)
        trained_on: Any = trunk.pretrained_cfg
        self.normalize = Normalize(*statistics_of(trained_on, input_channels(config)))
        self.trunk = trunk
        self.heads = nn.ModuleDict(
            {
                name: build_head(kinds[name], chosen[name], shape, task.output, task.num_outputs, name)
                for name, task in tasks.items()
            }
        )
        for name, task in tasks.items():
            if task.shares_weights:
                share_weights(self.heads[name], name)
        self.memory_format = memory_format
        self.image_size = size_of(image_size)
        self.channels = input_channels(config)
        self.to(memory_format=memory_format)
        # Compiled methods by name.
        self._compiled: dict[str, Callable[..., Any]] = {}
        self._try_out({name: (own, tasks[name].num_outputs) for name, own in chosen.items() if own is not None})

    def _try_out(self, heads: Mapping[str, tuple[HeadConfig, int]]) -> None:
        """Runs heads that were chosen, each on nothing but the features that it says it reads.

        Args:
            heads: By task, what was configured, and the channels of the task's output.
        """
        if not heads:
            return
        with in_eval_mode(self), torch.no_grad():
            found = self.encode(self.example_inputs(1), heads)
            for name, (config, num_outputs) in heads.items():
                try_out(self._head(name), found.only(self.reads([name])), self.image_size, config, num_outputs, name)

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
            "b h w c", uint8, all 0.
        """
        shape = (num_images, *self.image_size, self.channels)
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
        kinds = self.reads(tasks)
        levels = self.levels if "pyramid" in kinds else []
        return read_features(self.trunk, prepared, levels, "pooled" in kinds, "tokens" in kinds)

    def reads(self, tasks: Collection[str] | None) -> frozenset[Kind]:
        """The kinds of the trunk's features that the heads of some tasks read."""
        return frozenset[Kind]().union(*(self._head(name).reads for name in self._names_of(tasks)))

    def why_not_cut(self, prefix: Prefix, tasks: Collection[str], measured: Collection[str]) -> str:
        """Why a phase of some tasks cannot run only the trunk after a prefix for all measured ones; empty if it can."""
        if prefix.modules and self.reads(tasks) != self.reads(measured):
            # Training would run the rest of the trunk for features that only validation reads.
            return "the phase's tasks read other features of the trunk than all tasks do"
        return ""

    def decode_joined(self, features: Features, size: tuple[int, int], tasks: Collection[str]) -> dict[str, Tensor]:
        """As `decode`, with the linear heads as one product, whose sums round differently."""
        heads = {name: self.heads[name] for name in self._names_of(tasks)}
        joined = {name: heads[name] for name in joinable(heads)}
        if len(joined) < 2 or features.pooled is None:
            return self.decode(features, size, tasks)
        rest = heads.keys() - joined.keys()
        return joined_outputs(joined, features.pooled) | (self.decode(features, size, rest) if rest else {})

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
        return {name: self.heads[name](features, size) for name in self._names_of(tasks)}

    def _names_of(self, tasks: Collection[str] | None) -> list[str]:
        return [name for name in self.heads if tasks is None or name in tasks]

    def _head(self, task: str) -> Head:
        head = self.heads[task]
        assert isinstance(head, Head)
        return head
