"""Data sets that are made, not downloaded: from the embedded garments, written to the data cache block by block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
import xxhash
from tqdm import tqdm

from mtl.checkpoint.tensor_file import TensorFileError, read_safetensors
from mtl.config import GeneratedData, SettingError
from mtl.config.file_data import SplitName
from mtl.data.cache import DataError, cached, default_cache_dir, entry_of
from mtl.data.dataset import Batch, Split
from mtl.data.generated import multifashion, scenes, sprites
from mtl.data.generated.rows_file import Arrays, RowsFile, write_rows
from mtl.data.generated.sprites import load_sprites
from mtl.data.generated.stored_split import StoredSplit
from mtl.data.memory import MemorySplit, Transform
from mtl.data.room import check_disk, check_image, check_memory, stored_bytes
from mtl.data.source import Source, pipelines_of
from mtl.runtime.console import logger
from mtl.runtime.text import shorten
from mtl.tasks import Task
from mtl.tasks.base import LabelKind

_S = TypeVar("_S", MemorySplit, StoredSplit)


@dataclass(frozen=True)
class BuiltIn:
    """A data set that is made, not downloaded.

    Attributes:
        module: Where its `render_block`, `stored` and `BLOCK` live.
        num_train: Training images, unless the configuration says otherwise.
        num_val: Validation images, unless the configuration says otherwise.
        labels: The labels that it gives; tasks are named after them.
        channels: Channels of the images.
        classes: The names of classes, by label.
    """

    module: ModuleType
    num_train: int
    num_val: int
    labels: tuple[str, ...]
    channels: int
    classes: Mapping[str, Sequence[str]]


_GARMENTS = (
    *("T-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
_IN_ROOMS = {"segmentation": ("floor", "wall", "sphere", *_GARMENTS), "object": _GARMENTS}
_ON_A_CANVAS = {"left": _GARMENTS, "right": _GARMENTS}

BUILT_IN: Mapping[str, BuiltIn] = {
    "scenes": BuiltIn(scenes, 6000, 500, ("segmentation", "depth", "normals", "object"), 3, _IN_ROOMS),
    "multifashion": BuiltIn(multifashion, 20_000, 2000, ("left", "right"), 1, _ON_A_CANVAS),
}


class GeneratedSource(Source):
    def __init__(self, config: GeneratedData, kinds: Mapping[str, LabelKind]) -> None:
        self._config, self._kinds = config, kinds
        self.labels, self.classes = BUILT_IN[config.name].labels, BUILT_IN[config.name].classes
        self.num_images = num_images(config)

    @property
    def channels(self) -> int:
        return BUILT_IN[self._config.name].channels

    def load_split(
        self, which: SplitName, tasks: Mapping[str, Task], label_of: Mapping[str, str], quiet: bool
    ) -> Split:
        config = self._config
        if which == "test":
            raise SettingError("data.name", f"{config.name} has no split 'test'; it has train and val")
        pipeline = pipelines_of(config)[which]
        kinds = {name: self._kinds[label] for name, label in label_of.items()}
        transform = Transform(pipeline, kinds) if getattr(config.transform, which) else None
        if _split_bytes(config, which) > 1e9 * config.memory_gb:
            file = _file_of(config, which, quiet)
            with _as_data_error(file):
                rows = RowsFile(file)
            return _checked(StoredSplit(rows, tasks, label_of, transform), which, config, tasks)
        split = load_split(config, which, quiet).with_labels(label_of)
        return replace(_checked(split, which, config, tasks).knowing(tasks), transform=transform)

    def preview(self, tasks: Mapping[str, Task], label_of: Mapping[str, str], num: int) -> Batch:
        train = self.load_split("train", tasks, label_of, quiet=True)
        return train.batch(torch.linspace(0, len(train) - 1, min(num, len(train))).long())


def check_room(config: GeneratedData) -> None:
    """Raises `SettingError` if what is to be made is certain not to fit into memory, or on the data cache's disk."""
    data, size = BUILT_IN[config.name], config.image_size
    on_disk, num_made = 0, 0
    check_image(config.size)
    for split, key, num in zip(("train", "val"), ("num_train", "num_val"), num_images(config), strict=True):
        try:
            if entry_of(_cache_dir(config), _key(data, config, split, num)).exists():
                continue
        except OSError as error:
            raise SettingError("data.cache_dir", f"{_cache_dir(config)} cannot be read: {error.strerror}") from error
        block = data.module.BLOCK
        # Images are made in whole blocks.
        check_memory("data.image_size", config.size, block, 2 * stored_bytes(data.module.stored(block, size)))
        if _split_bytes(config, split) <= 1e9 * config.memory_gb:
            check_memory(f"data.{key}", config.size, num, _split_bytes(config, split))
        on_disk, num_made = on_disk + _split_bytes(config, split), num_made + num
    key = "data.num_train" if config.num_train else "data.num_val" if config.num_val else "data.image_size"
    check_disk(key, config.size, num_made, on_disk, _cache_dir(config))


def num_images(config: GeneratedData) -> tuple[int, int]:
    """Images in the training and the validation split."""
    data = BUILT_IN[config.name]
    return config.num_train or data.num_train, config.num_val or data.num_val


def load_split(config: GeneratedData, split: str, quiet: bool) -> MemorySplit:
    """A split in memory, with all labels; arguments and errors as of `_file_of`."""
    file = _file_of(config, split, quiet)
    with _as_data_error(file):
        tensors, _ = read_safetensors(file)
    return MemorySplit(tensors.pop("images"), tensors)


@contextmanager
def _as_data_error(file: Path) -> Iterator[None]:
    """Errors of opening a file of the data cache as `DataError`, with its name."""
    try:
        yield
    except (OSError, TensorFileError) as error:
        raise DataError(f"the data cache {file} cannot be read: {error}") from error


def _file_of(config: GeneratedData, split: str, quiet: bool) -> Path:
    """The file of a split in the data cache; makes it if it is not there.

    Raises:
        DataError: The data cache cannot be written or read.
    """
    data, num = BUILT_IN[config.name], num_images(config)[split == "val"]
    shapes = {name: shape for name, (shape, _) in data.module.stored(num, config.image_size).items()}
    make = lambda file: write_rows(file, num, _render(data, config, split, num, quiet))  # noqa: E731
    return cached(_cache_dir(config), _key(data, config, split, num), shapes, make)


def _split_bytes(config: GeneratedData, split: str) -> int:
    """The size of a split in memory."""
    stored = BUILT_IN[config.name].module.stored(num_images(config)[split == "val"], config.image_size)
    return stored_bytes(stored)


def _cache_dir(config: GeneratedData) -> Path:
    return Path(config.cache_dir).expanduser() if config.cache_dir else default_cache_dir()


def _key(data: BuiltIn, config: GeneratedData, split: str, num: int) -> dict[str, Any]:
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


def _code_digest(module: ModuleType) -> str:
    sources = [Path(source.__file__ or "").read_bytes() for source in (module, sprites)]
    return xxhash.xxh3_64_hexdigest(b"".join(sources))


def _render(data: BuiltIn, config: GeneratedData, split: str, num: int, quiet: bool) -> Iterator[Arrays]:
    """The images of a split, block by block; a bar appears if it takes longer than a second."""
    garments = load_sprites(split)
    size = data.module.BLOCK
    # Splits draw from seeds of their own; their garments are disjoint anyway.
    seed = 2 * config.seed + (split == "val")
    numbers = range((num + size - 1) // size)
    title = f"{config.name}: making {num} {split} images"
    for number in tqdm(numbers, title, disable=quiet or None, delay=1, leave=False):
        yield data.module.render_block(garments, config.image_size, seed, number)


def _checked(split: _S, which: str, config: GeneratedData, tasks: Mapping[str, Task]) -> _S:
    """A split whose labels fit the tasks, and in which every sample can be trained on.

    Raises:
        SettingError: The labels do not fit a task.
        DataError: A sample cannot be trained on, and `data.on_bad_sample` is `raise`; or none can.
    """
    if config.on_bad_sample == "skip":
        split = _sound(split, which, config, tasks)
    for name, task in tasks.items():
        try:
            for part in split.label_parts(name):
                task.check_labels(part)
        except ValueError as error:
            raise SettingError(f"tasks.{name}", f"the labels of {config.name} do not fit: {error}") from error
    return _sound(split, which, config, tasks)


def _sound(split: _S, which: str, config: GeneratedData, tasks: Mapping[str, Task]) -> _S:
    """A split without the samples that cannot be trained on.

    Raises:
        DataError: There is one, and `data.on_bad_sample` is `raise`; or there is no other.
    """
    bad = torch.zeros(len(split), dtype=torch.bool)
    for name, task in tasks.items():
        found = torch.cat([task.bad_samples(part) for part in split.label_parts(name)])
        if config.on_bad_sample == "raise" and bool(found.any()):
            first, number = int(found.nonzero()[0]), int(found.sum())
            raise DataError(
                f"{config.name}, {which}: sample {first} has a label of {name} that cannot be trained on"
                f" ({task.why_bad}), and {number - 1} more have;"
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
