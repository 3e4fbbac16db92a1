"""`office31` and `office_home`: a classification task for each domain; each image belongs to one of them.

Lists as LibMTL has them (https://github.com/median-research-group/LibMTL, examples/office/data_txt): a line is
`amazon/images/back_pack/frame_0065.jpg 0`, a file and the number of its class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import torch
from torch import Tensor

from mtl.config.public_data import OfficeConfig, PublicDataConfig
from mtl.data.cache import DataError
from mtl.data.files.fileset import IMAGE
from mtl.data.files.sets.base import PublicSet, rgb
from mtl.tasks.base import LabelKind


class OfficeSet(PublicSet):
    """The images of the domains that tasks want, one domain after the other. Each has the label of its domain only."""

    splits = ("train", "val", "test")
    num_classes: ClassVar[int]

    def __init__(self, settings: PublicDataConfig, split: str, kinds: Mapping[str, LabelKind]) -> None:
        super().__init__(settings, split, kinds)
        assert isinstance(settings, OfficeConfig)
        self._files: list[str] = []
        self._numbers: list[int] = []
        self._domains: list[str] = []
        for domain in self.wanted or self.labels:
            for file, number in self._rows(f"{settings.lists}/{domain}_{split}.txt"):
                self._files.append(file)
                self._numbers.append(number)
                self._domains.append(domain)
        self.folder.check_files(self._files)
        names = self._class_names()
        self.classes = dict.fromkeys(self.labels, names) if names else {}

    def __len__(self) -> int:
        return len(self._files)

    def file(self, index: int, name: str) -> str | None:
        return self._files[index] if name == IMAGE else None

    def load(self, name: str, file: Path) -> Any:  # noqa: ARG002  only images are files
        return rgb(file)

    def column(self, label: str) -> Tensor:
        """The class of all images, "n"; NaN for those of other domains."""
        rows = zip(self._numbers, self._domains, strict=True)
        return torch.tensor([number if domain == label else float("nan") for number, domain in rows]).double()

    def _value(self, index: int, name: str) -> Any:
        if name == IMAGE:
            return super()._value(index, name)
        return self._numbers[index] if self._domains[index] == name else None

    def _rows(self, file: str) -> list[tuple[str, int]]:
        """The images of a list, and their classes."""
        rows = []
        for number, line in enumerate(self.folder.lines(file), 1):
            image, _, label = line.rpartition(" ")
            if not image or not label.isdecimal() or int(label) >= self.num_classes:
                raise DataError(
                    f"{self.folder.root / file}: line {number}: expected a file and a class from 0 to"
                    f" {self.num_classes - 1}, got {line}"
                )
            rows.append((image, int(label)))
        if not rows:
            raise DataError(f"{self.folder.root / file}: expected a file and a class in each line, got an empty list")
        return rows

    def _class_names(self) -> Sequence[str]:
        """The folders of the images by the number of their class; none if not every class has an image here."""
        folders: dict[int, str] = {}
        for file, number in zip(self._files, self._numbers, strict=True):
            folder = PurePosixPath(file).parent.name
            if folders.setdefault(number, folder) != folder:
                raise DataError(
                    f"{self.folder.root}: the lists have class {number} for images in the folders {folders[number]} and"
                    f" {folder}; expected one folder for each class"
                )
        return [folders[number] for number in sorted(folders)] if len(folders) == self.num_classes else []


class Office31(OfficeSet):
    """Objects of an office from a shop, a camera and a webcam: 31 classes (Saenko et al., ECCV 2010)."""

    layout = "{amazon,dslr,webcam}/images/<class>/*.jpg, lists/{amazon,dslr,webcam}_{train,val,test}.txt"
    label_kinds: ClassVar[Mapping[str, tuple[LabelKind, ...]]] = dict.fromkeys(("amazon", "dslr", "webcam"), ("class",))
    num_classes = 31


class OfficeHome(OfficeSet):
    """Objects of office and home as art, clip art, products and photographs: 65 classes (arXiv 1706.07522)."""

    layout = "{Art,Clipart,Product,Real_World}/<class>/*.jpg, lists/{Art,...}_{train,val,test}.txt"
    label_kinds: ClassVar[Mapping[str, tuple[LabelKind, ...]]] = dict.fromkeys(
        ("Art", "Clipart", "Product", "Real_World"), ("class",)
    )
    num_classes = 65
