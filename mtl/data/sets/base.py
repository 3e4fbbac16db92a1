"""What all public data sets share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from mtl.config.public_data import PublicDataConfig
from mtl.data.cache import DataError
from mtl.data.fileset import IMAGE, FileSet
from mtl.data.reading import read_depth, read_image, read_mask
from mtl.data.sets.folder import SetFolder
from mtl.runtime.text import hint, shorten
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
        for label, kind in kinds.items():
            if label not in self.label_kinds:
                known = ", ".join(self.label_kinds)
                raise DataError(
                    f"{settings.name} has no label {label!r}{hint(label, self.label_kinds)}; it has {known}"
                )
            if kind not in self.label_kinds[label]:
                own = " or ".join(self.label_kinds[label])
                raise DataError(f"{settings.name}: expected a task that learns {own} from {label!r}, got {kind}")
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


def table_of(class_of: Mapping[int, int], none: Iterable[int] = ()) -> Tensor:
    """A table for `classes_by`.

    Args:
        class_of: The class of each number that a mask may hold.
        none: Numbers of pixels that have no class.

    Returns:
        "n", int16: the class of each number, `NO_CLASS` for none, -1 for numbers that no mask holds.
    """
    classes = {**class_of, **dict.fromkeys(none, NO_CLASS)}
    return torch.tensor([classes.get(stored, -1) for stored in range(max(classes) + 1)], dtype=torch.int16)


def classes_by(table: Tensor, file: Path) -> Tensor:
    """A mask whose stored numbers are looked up in a table.

    Args:
        table: What `table_of` returned.
        file: The mask.

    Returns:
        "h w", uint8.

    Raises:
        DataError: The mask holds a number that the table has not.
    """
    stored = read_mask(file).long()
    is_known = (stored >= 0) & (stored < len(table))
    classes = table[torch.where(is_known, stored, 0)]
    unknown = stored[~is_known | (classes < 0)]
    if len(unknown):
        known = shorten([str(number) for number in (table >= 0).nonzero().flatten().tolist()], 50)
        raise DataError(f"{file}: expected the numbers {known}, got {int(unknown[0])}")
    return classes.to(torch.uint8)


def above(file: Path, threshold: float) -> Tensor:
    """1 where a picture or array is above a threshold, else 0; "h w", uint8."""
    return (read_depth(file)[0] > threshold).to(torch.uint8)
