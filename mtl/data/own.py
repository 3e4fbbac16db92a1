"""A data set of the user's own: a torch `Dataset` whose items are dicts, read once into memory."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from mtl.config import DataConfig, SettingError
from mtl.config.own import make_own, own_class
from mtl.data.cache import DataError
from mtl.data.dataset import Split
from mtl.data.room import check_memory
from mtl.data.workers import ahead, read_by_workers
from mtl.runtime.plugin import where_it_failed
from mtl.runtime.text import hint
from mtl.tasks import Task

IMAGE = "image"
_Read = tuple[int, Mapping[str, Any] | DataError]
_SPLITS = {"train": "num_train", "val": "num_val"}


class OwnData:
    """The training and the validation split of a class that the user names.

    Attributes:
        num_images: Images in both splits.
    """

    def __init__(self, config: DataConfig) -> None:
        """Makes both splits: `Name(split="train", **options)`, and with `val`.

        Raises:
            SettingError: The class cannot be had, does not take its options, or is no data set of dicts.
        """
        self._config = config
        self._splits = {split: _first_of(_make(config, split), config, split) for split in _SPLITS}
        self.num_images = (len(self._splits["train"]), len(self._splits["val"]))

    def labels(self, wanted: Collection[str]) -> tuple[str, ...]:
        """The labels of the first training images, up to the one with which all that are wanted are there.

        Raises:
            DataError: One of these items cannot be read.
        """
        found: dict[str, None] = {}
        for index in range(self.num_images[0]):
            item = _item(self._splits["train"], index, self._config, "train")
            found |= dict.fromkeys(name for name in item if name != IMAGE)
            if found.keys() >= set(wanted):
                break
        return tuple(found)

    def load(self, which: str, tasks: Mapping[str, Task], label_of: Mapping[str, str], quiet: bool) -> Split:
        """Reads a split into memory.

        Args:
            which: `train` or `val`.
            tasks: The tasks by name.
            label_of: The name of each task's label.
            quiet: Whether to show no progress bar.

        Raises:
            DataError: An item cannot be read, or does not fit the others.
            SettingError: They do not fit into memory.
        """
        dataset, place = self._splits[which], f"{self._config.name}, {which}"
        images: _Column | None = None
        labels = {name: _Column(len(dataset), f"{place}: item {{}}: {label}") for name, label in label_of.items()}
        title = f"{self._config.name}: reading {which}"
        with tqdm(total=len(dataset), desc=title, disable=quiet or None, delay=1, leave=False) as bar:
            for index, item in self._items(dataset, which):
                image = _image(item, f"{place}: item {index}", self._config.image_size)
                if images is None:
                    stored = {IMAGE: ((len(dataset), *image.shape), 1)}
                    check_memory(f"data.{_SPLITS[which]}", self._config.image_size, len(dataset), stored)
                    images = _Column(len(dataset), f"{place}: item {{}}: {IMAGE}")
                images.put(index, image)
                for name, label in label_of.items():
                    if (value := item.get(label)) is not None:
                        labels[name].put(index, _tensor(value, f"{place}: item {index}: {label}"))
                bar.update()
        assert images is not None and images.values is not None
        return Split(images.values, {name: self._whole(labels[name], tasks[name], name, place) for name in tasks})

    def _whole(self, column: _Column, task: Task, name: str, place: str) -> Tensor:
        """A task's labels, with the task's value for none where an item has none."""
        if column.values is None:
            raise DataError(f"{place}: no item has the label that the task {name!r} learns")
        missing = (~column.is_there).nonzero().flatten()
        if not len(missing):
            return column.values
        labels, first = column.values, column.values[column.is_there][0]
        none = task.unlabelled(first if first.is_floating_point() else first.long())
        if not torch.equal(none.to(labels.dtype).to(none.dtype), none):
            labels = labels.long()  # such as -1 among whole numbers of 8 bits
        labels[missing] = none.to(labels.dtype)
        return labels

    def _items(self, dataset: Subset[Any], which: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """The items in their order, read by as many workers as batches are."""
        reader, num_workers = _Reader(dataset, self._config, which), min(self._config.num_workers, len(dataset))
        if num_workers:
            items = ahead(read_by_workers(reader, [[index] for index in range(len(dataset))], num_workers))
        else:
            items = (reader.__getitems__([index]) for index in range(len(dataset)))
        for index, item in items:
            if isinstance(item, DataError):
                raise item
            yield index, item


class _Column:
    """One tensor an item, all of one shape and kind.

    Attributes:
        values: Those of all items, first axis n; None before the first.
        is_there: "n", bool.
    """

    def __init__(self, num: int, where: str) -> None:
        self.values: Tensor | None = None
        self.is_there = torch.zeros(num, dtype=torch.bool)
        self._where = where
        self._first = 0

    def put(self, index: int, value: Tensor) -> None:
        """Raises `DataError` if it is of another shape or kind than the first one."""
        if self.values is None:
            self.values = torch.zeros((len(self.is_there), *value.shape), dtype=value.dtype)
            self._first = index
        own = self.values
        if value.shape != own.shape[1:] or value.dtype != own.dtype:
            raise DataError(
                f"{self._where.format(index)}: expected {_words(own[self._first])} as item {self._first} has,"
                f" got {_words(value)}"
            )
        own[index] = value
        self.is_there[index] = True


class _Reader(Dataset[_Read]):
    """Single items with their index; one that cannot be read is the error that says so, whole across processes."""

    def __init__(self, dataset: Subset[Any], config: DataConfig, which: str) -> None:
        self._dataset, self._config, self._which = dataset, config, which

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitems__(self, indices: list[int]) -> _Read:
        (index,) = indices
        try:
            return index, _item(self._dataset, index, self._config, self._which)
        except DataError as error:
            return index, error


def _make(config: DataConfig, split: str) -> Dataset[Any]:
    kind = own_class(config.name, "data.name", Dataset)
    made: Dataset[Any] = make_own(kind, config.options, "data.options", f"{config.name}, {split}", split=split)
    try:
        len(made)  # type: ignore[arg-type]
    except Exception as error:  # the user's code may raise anything
        raise SettingError("data.name", f"{config.name}, {split}: {where_it_failed(error)}") from error
    return made


def _first_of(dataset: Dataset[Any], config: DataConfig, split: str) -> Subset[Any]:
    """As many items as the configuration asks for."""
    number = len(dataset)  # type: ignore[arg-type]
    if number == 0:
        raise SettingError("data.name", f"{config.name} has no image in its split {split!r}")
    asked = getattr(config, _SPLITS[split])
    if asked is not None and asked > number:
        message = f"expected at most the {number} images of {config.name}'s split {split!r}, got {asked}"
        raise SettingError(f"data.{_SPLITS[split]}", message)
    return Subset(dataset, range(asked or number))


def _item(dataset: Subset[Any], index: int, config: DataConfig, split: str) -> Mapping[str, Any]:
    try:
        item = dataset[index]
    except Exception as error:  # the user's code may raise anything
        raise DataError(f"{config.name}, {split}: item {index}: {where_it_failed(error)}") from error
    if not isinstance(item, Mapping) or IMAGE not in item:
        got = type(item).__name__
        if isinstance(item, Mapping):
            got = f"one with {', '.join(map(str, item))}{hint(IMAGE, list(map(str, item)))}"
        raise DataError(f"{config.name}, {split}: item {index}: expected a mapping with {IMAGE!r}, got {got}")
    return item


def _image(item: Mapping[str, Any], where: str, size: int) -> Tensor:
    """An image as it is stored, "h w c"."""
    value = item[IMAGE]
    image = _tensor(value, f"{where}: {IMAGE}")
    if image.ndim == 2:
        image = image[..., None]
    elif image.ndim == 3 and isinstance(value, Tensor):
        image = image.permute(1, 2, 0)
    if image.dtype != torch.uint8 or image.shape[:2] != (size, size) or image.shape[2:] not in ((1,), (3,)):
        raise DataError(
            f"{where}: expected an image of {size} x {size} pixels (data.image_size), 1 or 3 channels, whole numbers"
            f" of 8 bits (a tensor 'c h w', an array 'h w c', or a picture of Pillow), got {_words(image)}"
        )
    return image


def _tensor(value: Any, where: str) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, bool | int | float | np.number):
        return torch.tensor(value)
    try:
        return torch.from_numpy(np.array(value))
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: expected a number, a tensor or an array, got {type(value).__name__}") from error


def _words(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
