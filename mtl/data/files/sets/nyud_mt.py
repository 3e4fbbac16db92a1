"""`nyud_mt`: NYUv2 with segmentation in 40 classes, depth, normals and edges, in either of the trees that are shared.

The one by ASTMT and Vandenhende et al. (https://github.com/SimonVandenhende/Multi-Task-Learning-PyTorch) has JPEGs of
480 x 640 and arrays; the one by ATRC and InvPT (https://github.com/prismformore/Multi-Task-Transformer) has PNGs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from mtl.config.public_data import PublicDataConfig
from mtl.data.files.fileset import IMAGE
from mtl.data.files.reading import read_depth, read_normals
from mtl.data.files.sets.base import Numbers, PublicSet, above, rgb
from mtl.tasks.base import LabelKind

NAMES = (
    *("wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf", "picture"),
    *("counter", "blinds", "desk", "shelves", "curtain", "dresser", "pillow", "mirror", "floor mat", "clothes"),
    *("ceiling", "books", "refrigerator", "television", "paper", "towel", "shower curtain", "box", "whiteboard"),
    *("person", "night stand", "toilet", "sink", "lamp", "bathtub", "bag", "other structure", "other furniture"),
    "other prop",
)
# The files have 0 for none and the classes from 1 on.
_TABLE = Numbers({number + 1: number for number in range(len(NAMES))}, none=[0])
# By `image` and label, its folder and suffix in the tree with JPEGs, and its suffix in the other.
_FILES = {
    IMAGE: ("images", ".jpg", ".png"),
    "segmentation": ("segmentation", ".png", ".png"),
    "depth": ("depth", ".npy", ".npy"),
    "normals": ("normals", ".npy", ".png"),
    "edges": ("edge", ".npy", ".png"),
}


class NyudMt(PublicSet):
    """795 and 654 images. Depth in metres, 0 for none; `edges` is 1 on an edge, else 0."""

    layout = (
        "gt_sets/{train,val}.txt, segmentation/*.png, depth/*.npy, and either images/*.jpg, normals/*.npy, edge/*.npy,"
        " or images/*.png, normals/*.png, edge/*.png"
    )
    label_kinds: ClassVar[Mapping[str, tuple[LabelKind, ...]]] = {
        "segmentation": ("mask",),
        "depth": ("depth",),
        "normals": ("normals",),
        "edges": ("mask",),
    }
    classes: Mapping[str, Sequence[str]] = {"segmentation": NAMES, "edges": ("no edge", "edge")}

    def __init__(self, settings: PublicDataConfig, split: str, kinds: Mapping[str, LabelKind]) -> None:
        super().__init__(settings, split, kinds)
        self._names = self.folder.lines(f"gt_sets/{split}.txt")
        if not self._names:
            raise self.folder.mistake(f"{self.folder.root / 'gt_sets' / split}.txt: expected names of images, got none")
        self._has_pngs = not self.folder.path(f"images/{self._names[0]}.jpg").exists()
        self.folder.check_files(
            self.file(index, name) for name in (IMAGE, *self.wanted) for index in range(len(self._names))
        )

    def __len__(self) -> int:
        return len(self._names)

    def file(self, index: int, name: str) -> str:
        folder, *suffixes = _FILES[name]
        return f"{folder}/{self._names[index]}{suffixes[self._has_pngs]}"

    def load(self, name: str, file: Path) -> Any:
        if name == IMAGE:
            return rgb(file)
        if name == "segmentation":
            return _TABLE.read(file)
        if name == "edges":
            return above(file, 0.5 if file.suffix == ".npy" else 127.5)
        return read_depth(file) if name == "depth" else read_normals(file)
