"""`cityscapes`: street scenes as https://www.cityscapes-dataset.com publishes them: 19 classes, disparity.

Class numbers and the unit of disparity: https://github.com/mcordts/cityscapesScripts, helpers/labels.py and README.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from mtl.config.public_data import PublicDataConfig
from mtl.data.files.fileset import IMAGE
from mtl.data.files.reading import read_depth
from mtl.data.files.sets.base import Numbers, PublicSet, rgb
from mtl.tasks.base import LabelKind

NAMES = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation"),
    *("terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
)
# The number of each of these classes in `*_labelIds.png`, which has 0 to 33.
_IDS = (7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33)
_TABLE = Numbers({stored: number for number, stored in enumerate(_IDS)}, set(range(34)) - set(_IDS))
# By `image` and label, its folder and how its files end.
_FILES = {
    IMAGE: ("leftImg8bit", "_leftImg8bit.png"),
    "segmentation": ("gtFine", "_gtFine_labelIds.png"),
    "disparity": ("disparity", "_disparity.png"),
}


class Cityscapes(PublicSet):
    """1024 x 2048, 2,975 and 500 images. `disparity` is in pixels of that size, 0 for none; the sky has none."""

    layout = (
        "leftImg8bit/{train,val}/<city>/*_leftImg8bit.png, gtFine/{train,val}/<city>/*_gtFine_labelIds.png,"
        " disparity/{train,val}/<city>/*_disparity.png"
    )
    label_kinds: ClassVar[Mapping[str, tuple[LabelKind, ...]]] = {"segmentation": ("mask",), "disparity": ("depth",)}
    classes: Mapping[str, Sequence[str]] = {"segmentation": NAMES}

    def __init__(self, settings: PublicDataConfig, split: str, kinds: Mapping[str, LabelKind]) -> None:
        super().__init__(settings, split, kinds)
        self._split = split
        self._names: list[str] = []  # with the city, such as aachen/aachen_000000_000019
        for city in self.folder.folders(f"{_FILES[IMAGE][0]}/{split}"):
            found = {}
            for name in (IMAGE, *self.wanted):
                folder, suffix = _FILES[name]
                found[f"{folder}/{split}/{city}"] = self.folder.names(f"{folder}/{split}/{city}", suffix)
            self.folder.check_same(found)
            self._names += [f"{city}/{name}" for name in next(iter(found.values()))]
        if not self._names:
            raise self.folder.mistake(f"{self.folder.root / _FILES[IMAGE][0] / split}: no city in it")

    def __len__(self) -> int:
        return len(self._names)

    def file(self, index: int, name: str) -> str:
        folder, suffix = _FILES[name]
        return f"{folder}/{self._split}/{self._names[index]}{suffix}"

    def load(self, name: str, file: Path) -> Any:
        if name == IMAGE:
            return rgb(file)
        if name == "segmentation":
            return _TABLE.read(file)
        return read_depth(file).sub_(1).div_(256).clamp_(min=0)
