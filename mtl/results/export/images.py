"""The images on which an exported file is compared with the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mtl.config import ConfigError, DataConfig, RunConfig, SettingError
from mtl.config.mixed import MixedData
from mtl.data import DataError
from mtl.model import MultiTaskModel
from mtl.phases.data_source import open_source
from mtl.results.trained import TrainedModel
from mtl.runtime.console import first_line
from mtl.tasks import Task, labels_of

NUM_IMAGES = 8


@dataclass(frozen=True)
class ParityImages:
    """The images of the comparison.

    Attributes:
        images: "b c h w", uint8.
        origin: Where they come from, in words.
    """

    images: Tensor
    origin: str


def parity_images(model: TrainedModel) -> ParityImages:
    """Eight images of the run's validation data, of the model's size; random ones if the data cannot be opened."""
    network: MultiTaskModel = model.network
    try:
        stored = _of_validation(model.config, model.tasks)
    except (ConfigError, SettingError, DataError, OSError) as error:
        shape = (NUM_IMAGES, network.channels, *network.image_size)
        images = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        why = f"the validation data cannot be opened: {first_line(error)}"
        return ParityImages(images, f"random images of seed 0 ({why})")
    stored = stored[torch.arange(NUM_IMAGES) % len(stored)]
    images = stored.round().clamp(0, 255).to(torch.uint8) if stored.is_floating_point() else stored
    # Grey images are shown to each of three channels.
    images = images.permute(0, 3, 1, 2).expand(-1, network.channels, -1, -1).contiguous()
    return ParityImages(images, "the first images of the run's validation data")


def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images "b c h w", uint8, at another height and width."""
    if tuple(images.shape[-2:]) == size:
        return images
    inter = functional.interpolate(images.float(), size=size, mode="bilinear", antialias=True)
    return inter.round().clamp(0, 255).to(torch.uint8)


def _of_validation(config: RunConfig, tasks: Mapping[str, Task]) -> Tensor:
    """The first images, "b h w c"; as little of the data is read as can be."""
    data = config.data
    few = _bounded(data)
    if isinstance(data, MixedData):
        few = data.model_copy(update={"sets": {name: _bounded(own) for name, own in data.sets.items()}})
    label_of = labels_of(config)
    source = open_source(config.with_changes(data=few))
    _, val = source.load({name: tasks[name] for name in label_of}, label_of, quiet=True)
    return val.batch(val.examples(NUM_IMAGES)).images


def _bounded(data: DataConfig) -> DataConfig:
    """A data set with no more images in a split than are compared."""
    bounds = {key: min(getattr(data, key) or NUM_IMAGES, NUM_IMAGES) for key in ("num_train", "num_val")}
    return data.model_copy(update=bounds)
