"""`multimnist`: two images of MNIST on one canvas, each to be recognised (Sener & Koltun, arXiv 1810.04650).

The set is published as code that composes it from MNIST's files, and as pickles, which are not loaded. So the files of
MNIST are read, or those of a set in their format, such as Fashion-MNIST, and the pairs are composed here.
"""

from __future__ import annotations

import gzip
import struct
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtl.config.public_data import PublicDataConfig
from mtl.data.cache import DataError
from mtl.data.files.fileset import IMAGE
from mtl.data.files.sets.base import PublicSet
from mtl.tasks.base import LabelKind

# The canvas is this much larger than an image; one image lies top left, the other bottom right.
_SHIFT = 8
# Of the training file's images, those that pairs of the split `val` are made of.
_VAL_SHARE = 6
_KINDS = {"images": (2051, 3), "labels": (2049, 1)}


class MultiMnist(PublicSet):
    """36 x 36; as many pairs as images. `val` has the last sixth of the training file; splits share no image."""

    layout = "[raw/]{train,t10k}-images-idx3-ubyte[.gz], [raw/]{train,t10k}-labels-idx1-ubyte[.gz]"
    splits = ("train", "val", "test")
    label_kinds: ClassVar[Mapping[str, tuple[LabelKind, ...]]] = {"left": ("class",), "right": ("class",)}

    def __init__(self, settings: PublicDataConfig, split: str, kinds: Mapping[str, LabelKind]) -> None:
        super().__init__(settings, split, kinds)
        stem = "t10k" if split == "test" else "train"
        self._images, self._labels = self._find(f"{stem}-images-idx3-ubyte"), self._find(f"{stem}-labels-idx1-ubyte")
        (num, self._height, self._width), (num_labels,) = (
            _shape(self.folder.path(file), *_KINDS[kind])
            for kind, file in (("images", self._images), ("labels", self._labels))
        )
        if num != num_labels:
            raise DataError(
                f"{self.folder.root / self._labels}: expected {num} labels as there are images, got {num_labels}"
            )
        edge = num - num // _VAL_SHARE
        first, last = {"train": (0, edge), "val": (edge, num), "test": (0, num)}[split]
        if first == last:
            raise DataError(f"{self.folder.root / self._images}: expected at least {_VAL_SHARE} images, got {num}")
        # Each image is once on the left and once on the right.
        self._left = np.arange(first, last)
        self._right = np.random.default_rng(first).permutation(self._left)

    def __len__(self) -> int:
        return len(self._left)

    def file(self, index: int, name: str) -> str:  # noqa: ARG002  all pairs are made from two files
        return self._images if name == IMAGE else self._labels

    def load(self, name: str, file: Path) -> Any:
        raise AssertionError(f"{name} is made from parts of {file}")

    def files(self, index: int) -> Mapping[str, Path]:
        return {IMAGE: self.folder.path(self.file(index, IMAGE))}

    def read(self, index: int, names: Collection[str]) -> dict[str, Any]:
        return {name: self._pair(index) if name == IMAGE else int(self._classes(name)[index]) for name in names}

    def column(self, label: str) -> Tensor:
        """The class of all images on one side, "n"."""
        return torch.from_numpy(self._classes(label)).double()

    def where(self, index: int) -> str:
        return f"{self.folder.root / self._images}: images {self._left[index]} and {self._right[index]}"

    def _pair(self, index: int) -> Tensor:
        """Two images, the brighter one where they overlap; "1 h w", uint8."""
        canvas = np.zeros((self._height + _SHIFT, self._width + _SHIFT), np.uint8)
        canvas[:-_SHIFT, :-_SHIFT] = self._pixels[self._left[index]]
        corner = canvas[_SHIFT:, _SHIFT:]
        np.maximum(corner, self._pixels[self._right[index]], out=corner)
        return torch.from_numpy(canvas)[None]

    def _classes(self, name: str) -> NDArray[np.uint8]:
        numbers: NDArray[np.uint8] = self._numbers[self._left if name == "left" else self._right]
        return numbers

    @cached_property
    def _pixels(self) -> NDArray[np.uint8]:
        return _content(self.folder.path(self._images), *_KINDS["images"])

    @cached_property
    def _numbers(self) -> NDArray[np.uint8]:
        return _content(self.folder.path(self._labels), *_KINDS["labels"])

    def _find(self, name: str) -> str:
        choices = [f"{folder}{name}{suffix}" for folder in ("", "raw/") for suffix in ("", ".gz")]
        for choice in choices:
            if self.folder.path(choice).is_file():
                return choice
        raise self.folder.mistake(f"{self.folder.root / name}: no such file")


def _shape(file: Path, magic: int, num_axes: int) -> tuple[int, ...]:
    """The shape that the header of a file in MNIST's format gives.

    Args:
        file: The file, or that compressed by gzip.
        magic: The number with which it begins.
        num_axes: How many axes it has.

    Raises:
        DataError: It is no such file.
    """
    length = 4 * (1 + num_axes)
    header = _bytes(file, length)
    if len(header) < length or struct.unpack(">i", header[:4])[0] != magic:
        raise DataError(f"{file}: expected a file in MNIST's format with {num_axes} axes")
    return struct.unpack(f">{num_axes}i", header[4:])


def _content(file: Path, magic: int, num_axes: int) -> NDArray[np.uint8]:
    """The bytes of a file in MNIST's format, in its shape; read only.

    Raises:
        DataError: It is no such file, or has more or fewer bytes than its header says.
    """
    shape = _shape(file, magic, num_axes)
    values = np.frombuffer(_bytes(file), dtype=np.uint8)[4 * (1 + num_axes) :]
    if len(values) != np.prod(shape):
        raise DataError(f"{file}: expected {np.prod(shape):,} bytes after its header, got {len(values):,}")
    return values.reshape(shape)


def _bytes(file: Path, length: int = -1) -> bytes:
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            return stream.read(length)
    except (OSError, EOFError) as error:
        raise DataError(f"{file}: {getattr(error, 'strerror', None) or error}") from error
