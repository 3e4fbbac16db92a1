"""Data sets: images and labels in memory, made from the embedded garments."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor
from tqdm import tqdm

from mtl.config import DataConfig, SettingError
from mtl.config.own import is_own
from mtl.data import multifashion, scenes, sprites
from mtl.data.augment import View, draw_view
from mtl.data.cache import DataError, cached, default_cache_dir, entry_of
from mtl.data.dataset import Batch, Split
from mtl.data.loading import Loading, training_batches, validation_batches, validation_rounds, windows
from mtl.data.own import OwnData
from mtl.data.room import bytes_of, check_disk, check_image, check_memory
from mtl.data.samplers import num_batches
from mtl.data.sprites import load_sprites
from mtl.runtime.console import logger
from mtl.runtime.text import shorten
from mtl.tasks import Task

__all__ = [
    "BUILT_IN",
    "Batch",
    "DataError",
    "Loading",
    "Split",
    "View",
    "check_image",
    "check_room",
    "draw_view",
    "labels_of",
    "load_data",
    "num_images",
    "num_batches",
    "training_batches",
    "validation_batches",
    "validation_rounds",
    "windows",
]


@dataclass(frozen=True)
class BuiltIn:
    """A data set that is made, not downloaded.

    Attributes:
        module: Where its `render_block`, `stored` and `BLOCK` live.
        num_train: Training images, unless the configuration says otherwise.
        num_val: Validation images, unless the configuration says otherwise.
        labels: The labels that it gives; tasks are named after them.
    """

    module: ModuleType
    num_train: int
    num_val: int
    labels: tuple[str, ...]


BUILT_IN: Mapping[str, BuiltIn] = {
    "scenes": BuiltIn(scenes, 6000, 500, ("segmentation", "depth", "normals", "object")),
    "multifashion": BuiltIn(multifashion, 20_000, 2000, ("left", "right")),
}


def load_data(
    config: DataConfig, tasks: Mapping[str, Task], label_of: Mapping[str, str] | None = None, quiet: bool = False
) -> tuple[Split, Split]:
    """Makes or reads a data set, and checks that its labels fit the tasks.

    Args:
        config: Which data set.
        tasks: The tasks by name.
        label_of: The name of each task's label, if it is another than the task's; labels that no task learns are left
            out.
        quiet: Whether to show no progress bar.

    Returns:
        The training and the validation split.

    Raises:
        DataError: The data cache cannot be written or read.
        SettingError: The labels do not fit a task.
    """
    label_of = {name: (label_of or {}).get(name, name) for name in tasks}
    if is_own(config.name):
        own = OwnData(config)
        train, val = (own.load(split, tasks, label_of, quiet) for split in ("train", "val"))
    else:
        data, (num_train, num_val) = BUILT_IN[config.name], num_images(config)
        train = _load_split(data, config, "train", num_train, quiet).with_labels(label_of)
        val = _load_split(data, config, "val", num_val, quiet).with_labels(label_of)
    if config.on_bad_sample == "skip":
        train, val = _sound(train, "train", config, tasks), _sound(val, "val", config, tasks)
    for name, task in tasks.items():
        for split in (train, val):
            try:
                task.check_labels(split.labels[name])
            except ValueError as error:
                raise SettingError(f"tasks.{name}", f"the labels of {config.name} do not fit: {error}") from error
    return _sound(train, "train", config, tasks), _sound(val, "val", config, tasks)


def _sound(split: Split, which: str, config: DataConfig, tasks: Mapping[str, Task]) -> Split:
    """A split in which every sample can be trained on.

    Raises:
        DataError: A sample cannot be trained on, and `data.on_bad_sample` is `raise`; or none can.
    """
    bad = torch.zeros(len(split), dtype=torch.bool)
    for name, task in tasks.items():
        # In parts, since comparisons take as much room as the labels.
        found = torch.cat([task.bad_samples(part) for part in torch.split(split.labels[name], 1024)])
        if config.on_bad_sample == "raise" and bool(found.any()):
            first, number = int(found.nonzero()[0]), int(found.sum())
            raise DataError(
                f"{config.name}, {which}: sample {first} has a label of {name} that cannot be trained on"
                f" ({(task.bad_samples.__doc__ or '').strip().lower().rstrip('.')}), and {number - 1} more have;"
                " data.on_bad_sample=skip leaves them out"
            )
        bad |= found
    if not bool(bad.any()):
        return split
    if bool(bad.all()):
        raise DataError(f"{config.name}, {which}: every sample has a label that cannot be trained on")
    places = shorten([str(place) for place in bad.nonzero().flatten().tolist()], 5)
    logger.warning(f"{config.name}, {which}: {int(bad.sum())} of {len(split)} samples are left out: {places}")
    return split.without(bad)


def num_images(config: DataConfig) -> tuple[int, int]:
    """Images in the training and the validation split, which need not be made or read for it.

    Raises:
        SettingError: A data set of the user's own cannot be had.
    """
    if is_own(config.name):
        return OwnData(config).num_images
    data = BUILT_IN[config.name]
    return config.num_train or data.num_train, config.num_val or data.num_val


def labels_of(config: DataConfig, wanted: Collection[str]) -> tuple[str, ...]:
    """The names of a data set's labels.

    Args:
        config: Which data set.
        wanted: Those that tasks learn; of a data set of the user's own, images are read until all of them are found.

    Raises:
        SettingError: A data set of the user's own cannot be had.
        DataError: One of its images cannot.
    """
    return OwnData(config).labels(wanted) if is_own(config.name) else BUILT_IN[config.name].labels


def check_room(config: DataConfig) -> None:
    """Raises `SettingError` if what is to be made is certain not to fit into memory, or on the data cache's disk."""
    data = BUILT_IN.get(config.name)
    if data is None:
        return  # a data set that does not exist is reported where the labels are checked
    size, on_disk, num_made = config.image_size, 0, 0
    check_image(size)
    for split, key, num in zip(("train", "val"), ("num_train", "num_val"), num_images(config), strict=True):
        try:
            if entry_of(_cache_dir(config), _key(data, config, split, num)).exists():
                continue
        except OSError as error:
            raise SettingError("data.cache_dir", f"{_cache_dir(config)} cannot be read: {error.strerror}") from error
        block = data.module.BLOCK
        # Images are made in whole blocks.
        check_memory("data.image_size", size, block, data.module.stored(block, size))
        check_memory(f"data.{key}", size, num, data.module.stored(num, size))
        on_disk, num_made = on_disk + bytes_of(data.module.stored(num, size)), num_made + num
    key = "data.image_size" if config.num_train is None else "data.num_train"
    check_disk(key, size, num_made, on_disk, _cache_dir(config))


def _cache_dir(config: DataConfig) -> Path:
    return Path(config.cache_dir).expanduser() if config.cache_dir else default_cache_dir()


def _key(data: BuiltIn, config: DataConfig, split: str, num: int) -> dict[str, Any]:
    """Everything that a split depends on."""
    return {
        "name": config.name,
        # Data made by other code is other data.
        "code": _code_digest(data.module),
        "split": split,
        "num": num,
        "image_size": config.image_size,
        "seed": config.seed,
    }


def _load_split(data: BuiltIn, config: DataConfig, split: str, num: int, quiet: bool) -> Split:
    render: Callable[[], dict[str, Tensor]] = lambda: _render(data, config, split, num, quiet)  # noqa: E731
    shapes = {name: shape for name, (shape, _) in data.module.stored(num, config.image_size).items()}
    tensors = cached(_cache_dir(config), _key(data, config, split, num), shapes, render)
    return Split(tensors.pop("images"), tensors)


def _code_digest(module: ModuleType) -> str:
    sources = [Path(source.__file__ or "").read_bytes() for source in (module, sprites)]
    return xxhash.xxh3_64_hexdigest(b"".join(sources))


def _render(data: BuiltIn, config: DataConfig, split: str, num: int, quiet: bool) -> dict[str, Tensor]:
    """The first `num` images of a split; a bar appears if it takes longer than a second."""
    garments = load_sprites(split)
    size = data.module.BLOCK
    # Splits draw from seeds of their own; their garments are disjoint anyway.
    seed = 2 * config.seed + (split == "val")
    blocks = []
    numbers = range((num + size - 1) // size)
    for number in tqdm(
        numbers, f"{config.name}: making {num} {split} images", disable=quiet or None, delay=1, leave=False
    ):
        blocks.append(data.module.render_block(garments, config.image_size, seed, number))
    joined = {name: np.concatenate([block[name] for block in blocks])[:num] for name in blocks[0]}
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in joined.items()}
