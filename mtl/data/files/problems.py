"""Checks every file of a data set, which a run only reads when it comes to it."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from mtl.data.cache import DataError
from mtl.data.files.fileset import IMAGE, FileSet
from mtl.data.files.items import as_tensor
from mtl.data.files.label_files import FILE_KINDS
from mtl.runtime.text import shorten
from mtl.tasks.base import LabelKind


def problems(
    data: FileSet,
    kinds: Mapping[str, LabelKind],
    allowed: Mapping[str, Container[int]] | None = None,
    seen: Callable[[str, Tensor], None] = lambda _, __: None,
) -> Iterator[str]:
    """The problems of a split's items: files that are missing or cannot be read, sizes, values out of range.

    Args:
        data: The split; every image and label of it is read.
        kinds: What each label is.
        allowed: The class numbers that a label may have, of an image or of a pixel; all if not given.
        seen: Is called with each image and label that could be read, by its name.

    Yields:
        A line for each, with file and row.
    """
    for index in range(len(data)):
        size = None
        for name in (IMAGE, *kinds):
            try:
                read = data.read(index, (name,)).get(name)
                value = None if read is None else as_tensor(read, f"{data.where(index)}: {name}")
            except DataError as error:
                yield str(error)
                continue
            if value is None:
                continue
            seen(name, value)
            if name == IMAGE:
                size = tuple(value.shape[-2:])
            else:
                place = data.files(index).get(name)
                start = f"{data.where(index)}: {name}: {f'{place}: ' if place else ''}"
                yield from (start + what for what in _wrong_size(value, kinds[name], size))
                yield from (start + what for what in _wrong_values(value, kinds[name], (allowed or {}).get(name)))


def _wrong_size(label: Tensor, kind: LabelKind, size: tuple[int, ...] | None) -> Iterator[str]:
    own = tuple(label.shape[-2:])
    if kind in FILE_KINDS and size is not None and own != size:
        yield f"expected the image's size, {size[1]} x {size[0]} pixels, got {own[1]} x {own[0]}"


def _wrong_values(label: Tensor, kind: LabelKind, allowed: Container[int] | None) -> Iterator[str]:
    if kind in ("class", "mask") and allowed is not None:
        numbers = np.unique(label.numpy()).tolist()
        wrong = [str(number) for number in numbers if number not in allowed]
        if wrong:
            yield f"the task has no class {shorten(wrong, 5)}"
    if kind == "depth":
        num = int(torch.logical_or(label < 0, label.isinf()).sum())
        if num:
            yield f"{num} of {label.numel()} distances are negative or infinite"
