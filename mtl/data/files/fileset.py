"""The interface of a data set whose images and labels lie in files."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor
from torch.utils.data import Dataset

from mtl.data.files.mistakes import Mistakes
from mtl.runtime.fingerprint import fingerprint

IMAGE = "image"


class FileSet(Dataset[Mapping[str, Any]], ABC):
    """One split of a data set on disk: nothing but lists and tables is read until an item is asked for.

    Attributes:
        labels: The names of its labels.
        classes: The names of the classes, by label, if the data set knows them; a class's number is its place.
    """

    labels: tuple[str, ...]
    classes: Mapping[str, Sequence[str]] = {}

    @abstractmethod
    def __len__(self) -> int:
        """The number of images."""

    @abstractmethod
    def read(self, index: int, names: Collection[str]) -> dict[str, Any]:
        """Reads a part of an item.

        Args:
            index: Which item.
            names: What is read: `image`, and labels.

        Returns:
            The image "c h w", uint8 or float32 from 0 to 255; labels as their tasks take them, those that are missing
            left out.

        Raises:
            DataError: Something cannot be read; the message names file and, where there is one, the table's row.
        """

    @abstractmethod
    def files(self, index: int) -> Mapping[str, Path]:
        """The files of an item, by `image` and the names of labels that lie in files of their own."""

    def column(self, label: str) -> Tensor | None:  # noqa: ARG002  most labels lie in files
        """A label of all items, first axis n, if that takes no reading of files; labels that are missing are NaN.

        Numbers, class numbers and lists of numbers; float64, so that every whole number of 32 bits is exact.
        """
        return None

    def where(self, index: int) -> str:
        """An item as messages name it: a table's row, or the image's file."""
        return str(self.files(index)[IMAGE])

    def identity(self, items: Sequence[int], name: str = IMAGE) -> str | None:
        """A digest of some images, or of a label of theirs, which is another one whenever one of them is edited.

        Args:
            items: Which ones.
            name: `image`, or a label: files by name, size and time, what `column` has by its numbers.

        Returns:
            None if nobody knows.

        Raises:
            DataError: Files are not there; all of them are named, or the first ones of many.
        """
        if name != IMAGE and (column := self.column(name)) is not None:
            return fingerprint(column[torch.tensor(items)])
        digest, missing = xxhash.xxh3_128(), Mistakes()
        for index in items:
            path, stamp = self.path(index, name), ""
            try:
                if path is not None:
                    status = os.stat(path)  # noqa: PTH116  a `Path` for each of a million takes seconds
                    stamp = f"{path}\0{status.st_size}\0{status.st_mtime_ns}"
            except OSError as error:
                missing.add(f"{self.where(index)}: {name}: {path}: {error.strerror}")
            digest.update(f"{stamp}\n".encode())
        missing.check()
        return digest.hexdigest()

    def path(self, index: int, name: str) -> str | None:
        """The file of an image or a label, without a look at the disk; None if it is in no file of its own."""
        file = self.files(index).get(name)
        return None if file is None else str(file)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.read(index, (IMAGE, *self.labels))
