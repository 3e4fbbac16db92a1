"""`taskonomy`: buildings as the Omnidata tool downloads them, or in the older tree without the component's folder.

Folders, units and classes: https://github.com/StanfordVL/taskonomy/blob/master/data/README.md (Zamir et al., arXiv
1804.08328) and https://github.com/EPFL-VILAB/omnidata, omnidata_tools.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from mtl.config.public_data import PublicDataConfig, TaskonomyConfig
from mtl.data.cache import DataError
from mtl.data.files.fileset import IMAGE
from mtl.data.files.reading import read_depth, read_normals
from mtl.data.files.sets.base import Numbers, PublicSet, rgb
from mtl.tasks.base import LabelKind

NAMES = (
    *("background", "bottle", "chair", "couch", "potted plant", "bed", "dining table", "toilet", "tv", "microwave"),
    *("oven", "toaster", "sink", "refrigerator", "book", "clock", "vase"),
)
# The files have 0 for uncertain and the classes from 1 on.
_TABLE = Numbers({number + 1: number for number in range(len(NAMES))}, none=[0])
# By `image` and label, its folder as it is spelled now, and as the first samples spelled it.
_FOLDERS = {
    IMAGE: ("rgb",),
    "segmentation": ("segment_semantic", "segmentsemantic"),
    "depth": ("depth_zbuffer", "depth"),
    "distance": ("depth_euclidean", "mist"),
    "normals": ("normal",),
}
_NO_DEPTH = 65535


class Taskonomy(PublicSet):
    """512 x 512; splits by building. Depth and distance in metres, 0 for none; 17 classes, which another net found."""

    layout = (
        "{rgb,segment_semantic,depth_zbuffer,depth_euclidean,normal}/[taskonomy/]<building>/point_*_view_*_domain_*.png,"
        " splits_taskonomy/train_val_test_tiny.csv"
    )
    splits = ("train", "val", "test")
    label_kinds: ClassVar[Mapping[str, tuple[LabelKind, ...]]] = {
        "segmentation": ("mask",),
        "depth": ("depth",),
        "distance": ("depth",),
        "normals": ("normals",),
    }
    classes: Mapping[str, Sequence[str]] = {"segmentation": NAMES}

    def __init__(self, settings: PublicDataConfig, split: str, kinds: Mapping[str, LabelKind]) -> None:
        super().__init__(settings, split, kinds)
        assert isinstance(settings, TaskonomyConfig)
        self._names: list[str] = []  # with the building, such as allensville/point_0_view_1
        self._folders = {name: self._domain(name) for name in (IMAGE, *self.labels)}
        self._endings: dict[str, str] = {}
        here = set(self.folder.folders(self._folders[IMAGE]))
        buildings = [name for name in self._buildings(settings.buildings, split) if name in here]
        if not buildings:
            raise self.folder.mistake(
                f"{self.folder.root / self._folders[IMAGE]}: no building of the split {split!r} in {settings.buildings}"
            )
        for building in buildings:
            found = {f"{self._folders[name]}/{building}": self._views(name, building) for name in (IMAGE, *self.wanted)}
            self.folder.check_same(found)
            self._names += [f"{building}/{view}" for view in next(iter(found.values()))]

    def __len__(self) -> int:
        return len(self._names)

    def file(self, index: int, name: str) -> str:
        return f"{self._folders[name]}/{self._names[index]}{self._endings[name]}"

    def load(self, name: str, file: Path) -> Any:
        if name == IMAGE:
            return rgb(file)
        if name == "segmentation":
            return _TABLE.read(file)
        if name == "normals":
            return read_normals(file)
        stored = read_depth(file)
        return stored.masked_fill_(stored == _NO_DEPTH, 0).div_(512)

    def _domain(self, name: str) -> str:
        """The folder of `image` or a label: as it is spelled here, with the component's folder if that is there."""
        folder = next((each for each in _FOLDERS[name] if self.folder.has(each)), _FOLDERS[name][0])
        return f"{folder}/taskonomy" if self.folder.has(f"{folder}/taskonomy") else folder

    def _views(self, name: str, building: str) -> list[str]:
        """The names of the views in a folder; how they end, such as `_domain_rgb.png`, is the same in all buildings."""
        folder = f"{self._folders[name]}/{building}"
        files = self.folder.names(folder, ".png")
        ending = self._endings.setdefault(name, f"_domain_{files[0].partition('_domain_')[2]}.png")
        if wrong := [file for file in files if not f"{file}.png".endswith(ending)]:
            raise self.folder.mistake(
                f"{self.folder.root / folder}/{wrong[0]}.png: expected a name that ends in {ending}"
            )
        return [file.removesuffix(ending.removesuffix(".png")) for file in files]

    def _buildings(self, file: str, split: str) -> list[str]:
        """The buildings of a split, from a table with the columns id, train, val, test."""
        rows = list(csv.reader(self.folder.lines(file)))
        head = [cell.strip() for cell in rows[0]] if rows else []
        if not {"id", split}.issubset(head) or any(len(row) != len(head) for row in rows):
            raise DataError(f"{self.folder.root / file}: expected a table with the columns id,train,val,test")
        column = head.index(split)
        return [row[head.index("id")].strip() for row in rows[1:] if row[column].strip() == "1"]
