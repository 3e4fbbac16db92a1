"""One item of a data set on disk, in the form in which a split has it: sizes, channels and labels checked."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtl.data.cache import DataError
from mtl.data.files.fileset import IMAGE, FileSet
from mtl.data.transforms import Pipeline, build_transforms
from mtl.runtime.text import count
from mtl.tasks.base import SPATIAL, LabelKind

_IMAGE_TYPES = (torch.uint8, torch.float32)
# Images that are read to find out how many channels there are.
_NUM_LOOKED_AT = 16


@dataclass(frozen=True)
class ImageForm:
    """The form that every image of a data set is brought to.

    Attributes:
        size: Height and width in pixels.
        channels: 1, 3 or more; where it is 3, grey images are repeated, and transparency is dropped.
        dtype: uint8, or float32 for values from 0 to 255 of images with 16 bits.
    """

    size: tuple[int, int]
    channels: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Sample:
    """An item as it was read, and transformed.

    Attributes:
        image: "c h w", uint8, or float32 from 0 to 255; None if it was not to be read.
        labels: By the data set's names; those that are missing are left out.
    """

    image: Tensor | None
    labels: dict[str, Tensor]


class ItemReader:
    """Reads the items of one split of a data set.

    Attributes:
        items: The data set.
        place: The data set and the split, as messages name them.
        kinds: The kind of each label that is read.
        form: That of the images.
    """

    def __init__(
        self, items: FileSet, place: str, kinds: Mapping[str, LabelKind], form: ImageForm, pipeline: Pipeline
    ) -> None:
        """Args:
        items: The data set.
        place: The data set and the split, as messages name them.
        kinds: The kind of each label that is read.
        form: That of the images.
        pipeline: What makes a sample of an item.
        """
        self.items = items
        self.place = place
        self.kinds = dict(kinds)
        self.form = form
        self._pipeline = pipeline
        self._plain = build_transforms([], form.size, "data.image_size")

    def describe(self) -> Any:
        """All that samples depend on besides the files, as JSON."""
        return [self._pipeline.describe(), [*self.form.size, self.form.channels, str(self.form.dtype)]]

    def where(self, index: int) -> str:
        """An item as messages name it."""
        return f"{self.place}: {self.items.where(index)}"

    def read(self, index: int, names: Collection[str], with_image: bool, seed: int | None) -> Sample:
        """Reads and transforms an item.

        Args:
            index: Which one.
            names: The labels that are read.
            with_image: Whether the image is needed; it may be read all the same, if it decides how labels change.
            seed: What random transforms draw from; without it, the item is only resized if they would draw.

        Raises:
            DataError: Something cannot be read, or does not fit; the message names the item.
        """
        kinds = {name: self.kinds[name] for name in names}
        # Points are in pixels of the image, and random changes are drawn from its size.
        decides = "points" in kinds.values() or (seed is not None and not SPATIAL.isdisjoint(kinds.values()))
        try:
            item = self.items.read(index, [IMAGE, *names] if with_image or decides else list(names))
        except DataError as error:
            raise DataError(f"{self.place}: {error}") from error
        there = [name for name in names if item.get(name) is not None]
        labels = {name: as_tensor(item[name], f"{self.where(index)}: {name}") for name in there}
        maps = [name for name in labels if kinds[name] in SPATIAL and kinds[name] != "points"]
        if IMAGE in item:
            image = in_form(item[IMAGE], self.form, self.where(index))
        elif maps:
            # One that takes no memory has the size all the same.
            image = torch.zeros((), dtype=torch.uint8).expand(1, *labels[maps[0]].shape[-2:])
        else:
            return Sample(None, labels)
        for name in maps:
            if labels[name].shape[-2:] != image.shape[-2:]:
                what = "the image" if IMAGE in item else maps[0]
                raise DataError(f"{self.where(index)}: {name} has {_size(labels[name])}, and {what} {_size(image)}")
        pipeline = self._plain if seed is None and self._pipeline.is_random else self._pipeline
        try:
            image, labels = pipeline(image, labels, kinds, seed)
        except DataError as error:
            raise DataError(f"{self.where(index)}: {error}") from error
        return Sample(image if with_image else None, labels)


def in_form(image: Tensor, form: ImageForm, where: str) -> Tensor:
    """An image in the form that all images of a data set have, but for its size.

    Args:
        image: "c h w".
        form: That form.
        where: Which image it is, for the message.

    Raises:
        DataError: It has other channels, or is no image.
    """
    if image.dtype not in _IMAGE_TYPES or image.ndim != 3:
        raise DataError(f"{where}: expected an image, whole numbers of 8 bits, got {words(image)}")
    if image.dtype != form.dtype:
        image = image.round().to(torch.uint8) if image.is_floating_point() else image.float()
    channels = len(image)
    if form.channels == 3 and channels in (1, 4):
        return image.expand(3, -1, -1) if channels == 1 else image[:3]
    if channels != form.channels:
        raise DataError(f"{where}: expected an image of {count(form.channels, 'channel')}, got {channels}")
    return image


def first_labels(reader: ItemReader, label_of: Mapping[str, str], skips: bool) -> dict[str, Tensor]:
    """The first label of each task that there is, as it is after transforms.

    Args:
        reader: Reads the items.
        label_of: The name of each task's label.
        skips: Whether items that cannot be read are passed over.

    Raises:
        DataError: No item has a task's label, or one cannot be read.
    """
    found: dict[str, Tensor] = {}
    for index in range(len(reader.items)):
        wanted = {task: label for task, label in label_of.items() if task not in found}
        if not wanted:
            break
        try:
            labels = reader.read(index, sorted(set(wanted.values())), with_image=False, seed=None).labels
        except DataError:
            if not skips:
                raise
            continue
        found |= {task: labels[label] for task, label in wanted.items() if label in labels}
    for task in label_of:
        if task not in found:
            raise DataError(f"{reader.place}: no item has the label that the task {task!r} learns")
    return found


def image_form(items: FileSet, size: tuple[int, int]) -> ImageForm:
    """The form of a data set's images, of which some may be grey, or have transparency, or more bits.

    Args:
        items: The data set; some images are read, at even distances.
        size: Height and width in pixels.

    Raises:
        DataError: None of them can be read.
    """
    error, channels, dtypes = DataError("no image"), set[int](), set[torch.dtype]()
    for index in range(0, len(items), max(1, len(items) // _NUM_LOOKED_AT)):
        try:
            image: Tensor = items.read(index, [IMAGE])[IMAGE]
        except DataError as each:
            error = each
            continue
        channels.add(len(image))
        dtypes.add(image.dtype)
    if not channels:
        raise error
    common = channels.pop() if len(channels) == 1 else 3 if channels <= {1, 3, 4} else max(channels)
    return ImageForm(size, common, torch.float32 if torch.float32 in dtypes else torch.uint8)


def words(tensor: Tensor) -> str:
    """A tensor's type and shape."""
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


def as_tensor(value: Any, where: str) -> Tensor:
    """A label as a tensor. Raises `DataError` if it is neither a number nor an array."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, bool | int | float | np.number):
        return torch.tensor(value)
    try:
        return torch.from_numpy(np.array(value))
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: expected a number, a tensor or an array, got {type(value).__name__}") from error


def _size(maps: Tensor) -> str:
    return f"{maps.shape[-2]} x {maps.shape[-1]} pixels"
