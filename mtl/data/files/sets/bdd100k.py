"""`bdd100k`: roads with drivable area and lane marking on one set of images, and segmentation on another.

Layout and numbers: https://github.com/bdd100k/bdd100k, doc/source/download.rst and format.rst (Yu et al., arXiv
1805.04687).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from mtl.config.public_data import PublicDataConfig
from mtl.data.files.fileset import IMAGE
from mtl.data.files.sets.base import NO_CLASS, Numbers, PublicSet, rgb
from mtl.data.files.sets.cityscapes import NAMES
from mtl.tasks.base import LabelKind

# By label, which images have it, and the folder of its masks.
_IMAGES_OF = {
    **dict.fromkeys(("drivable", "lane_category", "lane_direction", "lane_style"), "100k"),
    "segmentation": "10k",
}
_MASKS_OF = {"drivable": "drivable", "segmentation": "sem_seg"}
_CLASSES: dict[str, tuple[str, ...]] = {
    "drivable": ("direct", "alternative", "background"),
    "lane_category": (
        *("crosswalk", "double other", "double white", "double yellow", "road curb", "single other", "single white"),
        *("single yellow", "background"),
    ),
    "lane_direction": ("parallel", "vertical", "background"),
    "lane_style": ("solid", "dashed", "background"),
    "segmentation": NAMES,
}


def _lanes(label: str, shift: int, bits: int) -> Numbers:
    """One label of a lane mask, in whose bytes the last three bits are the category, then background, style, direction.

    Args:
        label: The label; its last class is background.
        shift: Where its bits begin.
        bits: What remains of them.
    """
    background = len(_CLASSES[label]) - 1
    return Numbers({byte: background if byte & 0b1000 else (byte >> shift) & bits for byte in range(256)})


_NUMBERS = {
    "drivable": Numbers({0: 0, 1: 1, 2: 2}),
    "segmentation": Numbers({number: number for number in range(len(NAMES))}, none=[NO_CLASS]),
    "lane_category": _lanes("lane_category", 0, 0b111),
    "lane_style": _lanes("lane_style", 4, 1),
    "lane_direction": _lanes("lane_direction", 5, 1),
}


class Bdd100k(PublicSet):
    """720 x 1280; 70,000 and 10,000 images with drivable area and lanes, 7,000 and 1,000 others with segmentation.

    An image has the labels of its set only. The sets were taken from the same videos: an image of either whose name is
    also in the other's other split is left out of the training images, so that no validation image is trained on.
    """

    layout = (
        "images/{100k,10k}/{train,val}/*.jpg, labels/{drivable,lane,sem_seg}/masks/{train,val}/*.png"
        " (drivable and lane for 100k, sem_seg for 10k)"
    )
    label_kinds: ClassVar[Mapping[str, tuple[LabelKind, ...]]] = dict.fromkeys(_IMAGES_OF, ("mask",))
    classes: Mapping[str, Sequence[str]] = _CLASSES

    def __init__(self, settings: PublicDataConfig, split: str, kinds: Mapping[str, LabelKind]) -> None:
        super().__init__(settings, split, kinds)
        self._split = split
        self._items: list[tuple[str, str]] = []
        subsets = list(dict.fromkeys(_IMAGES_OF[label] for label in self.wanted)) or ["100k"]
        for subset in subsets:
            folders = {f"images/{subset}/{split}": ".jpg"}
            folders |= {self._masks(label): ".png" for label in self.wanted if _IMAGES_OF[label] == subset}
            found = {folder: self.folder.names(folder, suffix) for folder, suffix in folders.items()}
            self.folder.check_same(found)
            names = found[f"images/{subset}/{split}"]
            if split == "train":
                others = [f"images/{each}/val" for each in subsets if each != subset]
                held_out = {name for folder in others for name in self.folder.names(folder, ".jpg")}
                names = [name for name in names if name not in held_out]
            self._items += [(subset, name) for name in names]

    def __len__(self) -> int:
        return len(self._items)

    def file(self, index: int, name: str) -> str | None:
        subset, stem = self._items[index]
        if name == IMAGE:
            return f"images/{subset}/{self._split}/{stem}.jpg"
        return f"{self._masks(name)}/{stem}.png" if _IMAGES_OF[name] == subset else None

    def load(self, name: str, file: Path) -> Any:
        return rgb(file) if name == IMAGE else _NUMBERS[name].read(file)

    def _masks(self, label: str) -> str:
        return f"labels/{_MASKS_OF.get(label, 'lane')}/masks/{self._split}"
