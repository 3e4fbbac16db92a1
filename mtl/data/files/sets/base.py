"""The base of all public data sets."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from mtl.config.public_data import PublicDataConfig
from mtl.data.cache import DataError
from mtl.data.files.fileset import IMAGE, FileSet
from mtl.data.files.mistakes import Mistakes
from mtl.data.files.reading import read_depth, read_image, read_mask
from mtl.data.files.sets.folder import SetFolder
from mtl.runtime.text import shorten
from mtl.tasks.base import LabelKind

# The number of pixels that have no class, in what all sets return; the default of a task's `ignore_index`.
NO_CLASS = 255


class PublicSet(FileSet):
    """A split of a public data set.

    Only the files of labels that tasks want have to be there.

    Attributes:
        layout: What its folder holds, in a line, for messages.
        splits: The splits that it has.
        label_kinds: By label, what kinds of label it may be taken as.
        folder: Its folder.
        wanted: The labels that tasks want.
    """

    layout: ClassVar[str]
    splits: ClassVar[tuple[str, ...]] = ("train", "val")
    label_kinds: ClassVar[Mapping[str, tuple[LabelKind, ...]]]

    def __init__(self, settings: PublicDataConfig, split: str, kinds: Mapping[str, LabelKind]) -> None:
        """Finds the files; reads lists only.

        Args:
            settings: Which data set, and where.
            split: `train`, `val` or `test`.
            kinds: By label that tasks want, what kind of label they want it to be.

        Raises:
            DataError: The set has no such split or label, the label is of another kind, or a folder, list or file is
                missing.
        """
        if split not in self.splits:
            raise DataError(f"{settings.name} has no split {split!r}; it has {', '.join(self.splits)}")
        mistakes, known = Mistakes(), self.label_kinds
        for label, kind in kinds.items():
            if label not in known:
                what = f"{settings.name} has no label {label!r}; it has {', '.join(known)}"
                mistakes.add(what, label, known, label)
            elif kind not in known[label]:
                own = " or ".join(known[label])
                what = f"{settings.name}: expected a task that learns {own} from {label!r}, got {kind}"
                mistakes.add(what, label=label)
        mistakes.check()
        self.labels = tuple(self.label_kinds)
        self.folder = SetFolder(settings.root, self.layout, settings.follow_links)
        self.wanted = tuple(label for label in self.labels if label in kinds)

    @classmethod
    def prepare(cls, settings: PublicDataConfig, log: Callable[[str], None]) -> None:
        """Derives once what would take long to derive for every item; most sets have nothing of that kind.

        Args:
            settings: Which data set, and where.
            log: Is called with what was done, for the user.

        Raises:
            DataError: A file is missing or cannot be read.
        """
        log(f"{settings.name}: nothing to prepare")

    @abstractmethod
    def file(self, index: int, name: str) -> str | None:
        """The file of `image` or a label, relative to the folder; None if it is in no file of its own, or missing."""

    @abstractmethod
    def load(self, name: str, file: Path) -> Any:
        """Reads an image or label from its file; None if the file says that there is no label."""

    def read(self, index: int, names: Collection[str]) -> dict[str, Any]:
        assert {IMAGE, *self.wanted}.issuperset(names), "only labels that are wanted were looked for"
        values = {name: self._value(index, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    def files(self, index: int) -> Mapping[str, Path]:
        names = {name: self.file(index, name) for name in (IMAGE, *self.wanted)}
        return {name: self.folder.path(file) for name, file in names.items() if file is not None}

    def where(self, index: int) -> str:
        return str(self.folder.root / str(self.file(index, IMAGE)))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The image and the labels that tasks want."""
        return self.read(index, (IMAGE, *self.wanted))

    def _value(self, index: int, name: str) -> Any:
        file = self.file(index, name)
        return None if file is None else self.load(name, self.folder.path(file))


def rgb(file: Path) -> Tensor:
    """A picture as "3 h w", uint8, whatever it is stored as."""
    return read_image(file, to_rgb=True)


class Numbers:
    """The class of each number that a mask may hold, 0 to 255."""

    def __init__(self, class_of: Mapping[int, int], none: Iterable[int] = ()) -> None:
        """Makes the table.

        Args:
            class_of: The class of each number.
            none: Numbers of pixels that have no class.
        """
        classes = {**class_of, **dict.fromkeys(none, NO_CLASS)}
        self._known = bytes(sorted(classes))
        self._table = bytes(classes.get(number, NO_CLASS) for number in range(256))

    def read(self, file: Path) -> Tensor:
        """The classes of a mask, "h w", uint8.

        Raises:
            DataError: The mask cannot be read, or holds a number that is not among these.
        """
        stored = read_mask(file)
        if stored.dtype != torch.uint8:
            low, high = (int(bound) for bound in stored.aminmax())
            if low < 0 or high > 255:
                raise self._mistake(file, low if low < 0 else high)
        # Looking numbers up in a tensor takes longer than decoding the picture.
        content = stored.to(torch.uint8).numpy().tobytes()
        if unknown := content.translate(None, self._known):
            raise self._mistake(file, unknown[0])
        return torch.frombuffer(bytearray(content.translate(self._table)), dtype=torch.uint8).view(stored.shape)

    def _mistake(self, file: Path, number: int) -> DataError:
        return DataError(
            f"{file}: expected the numbers {shorten([str(each) for each in self._known], 50)}, got {number}"
        )


def above(file: Path, threshold: float) -> Tensor:
    """1 where a picture or array is above a threshold, else 0; "h w", uint8."""
    values = read_depth(file)[0] if file.suffix == ".npy" else read_mask(file)
    return (values > threshold).to(torch.uint8)
