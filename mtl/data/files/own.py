"""A data set of the user's own: a torch `Dataset` whose items are dicts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mtl.config import OwnData, SettingError
from mtl.config.own import make_own, own_class
from mtl.data.cache import DataError
from mtl.data.files.fileset import IMAGE, FileSet
from mtl.runtime.plugin import where_it_failed
from mtl.runtime.text import hint


class OwnSet(FileSet):
    """One split of a class that the user names: `Name(split="train", **options)`."""

    def __init__(self, config: OwnData, split: str, wanted: Collection[str]) -> None:
        """Args:
        config: The class and its options.
        split: `train` or `val`.
        wanted: The labels that tasks learn; items are read until all of them are found.

        Raises:
            SettingError: The class cannot be had, does not take its options, or has no images.
            DataError: An item cannot be read.
        """
        kind = own_class(config.name, "data.name", Dataset)
        self._dataset = make_own(kind, config.options, "data.options", f"{config.name}, {split}", split=split)
        try:
            self._num = len(self._dataset)
        except Exception as error:  # the user's code may raise anything
            raise SettingError("data.name", f"{config.name}, {split}: {where_it_failed(error)}") from error
        self.classes = getattr(self._dataset, "classes", {})
        self.labels = tuple(getattr(self._dataset, "labels", ())) or self._find_labels(wanted)

    def __len__(self) -> int:
        return self._num

    def read(self, index: int, names: Collection[str]) -> dict[str, Any]:
        item = self._item(index)
        try:
            image = {IMAGE: _image(item[IMAGE])} if IMAGE in names else {}
        except DataError as error:
            raise DataError(f"{self.where(index)}: {error}") from error
        read = {name: item[name] for name in names if name != IMAGE and item.get(name) is not None}
        return image | read

    def files(self, index: int) -> Mapping[str, Path]:  # noqa: ARG002  nobody knows
        return {}

    def where(self, index: int) -> str:
        return f"item {index}"

    def identity(self, items: Sequence[int], name: str = IMAGE) -> str | None:
        """The digest that the class gives, of images and labels alike; None if it gives none."""
        said = getattr(self._dataset, "identity", None)
        return None if said is None else f"{len(items)} {name} {said() if callable(said) else said}"

    def _find_labels(self, wanted: Collection[str]) -> tuple[str, ...]:
        found: dict[str, None] = {}
        for index in range(self._num):
            found |= dict.fromkeys(name for name in self._item(index) if name != IMAGE)
            if found.keys() >= set(wanted):
                break
        return tuple(found)

    def _item(self, index: int) -> Mapping[str, Any]:
        try:
            item = self._dataset[index]
        except Exception as error:  # the user's code may raise anything
            raise DataError(f"{self.where(index)}: {where_it_failed(error)}") from error
        if not isinstance(item, Mapping) or IMAGE not in item:
            got = type(item).__name__
            if isinstance(item, Mapping):
                got = f"one with {', '.join(map(str, item))}{hint(IMAGE, list(map(str, item)))}"
            raise DataError(f"{self.where(index)}: expected a mapping with {IMAGE!r}, got {got}")
        return item


def _image(value: Any) -> Tensor:
    """An image "c h w" of a tensor "c h w", an array "h w c" or "h w", or a picture of Pillow."""
    try:
        image = value.detach().cpu() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
    except (TypeError, ValueError) as error:
        raise DataError(f"{IMAGE}: expected a tensor, an array or a picture, got {type(value).__name__}") from error
    if image.ndim == 2:
        image = image[None]
    elif image.ndim == 3 and not isinstance(value, Tensor):
        image = image.permute(2, 0, 1)
    if image.dtype == torch.uint16:
        image = image.to(torch.float32) / 257
    elif image.dtype != torch.uint8 or image.ndim != 3:
        kind = str(image.dtype).removeprefix("torch.")
        raise DataError(
            f"{IMAGE}: expected whole numbers of 8 or 16 bits without sign (a tensor 'c h w', an array 'h w c', or a"
            f" picture of Pillow), got {kind} of shape {tuple(image.shape)}"
        )
    return image
