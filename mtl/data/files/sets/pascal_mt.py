"""`pascal_mt`: PASCAL-Context with segmentation, human parts, normals, saliency and edges (Maninis et al., 1904.08918).

Layout: https://github.com/SimonVandenhende/Multi-Task-Learning-PyTorch and
https://github.com/prismformore/Multi-Task-Transformer. `prepare` derives what both derive from MATLAB's files for every
item again: human parts, normals and edges.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from mtl.config.public_data import PublicDataConfig
from mtl.data.cache import DataError
from mtl.data.files.fileset import IMAGE
from mtl.data.files.reading import read_mask, read_normals
from mtl.data.files.sets.base import NO_CLASS, Numbers, PublicSet, above, rgb
from mtl.data.files.sets.folder import SetFolder
from mtl.tasks.base import LabelKind

NAMES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
PARTS = ("background", "head", "torso", "upper arm", "lower arm", "upper leg", "lower leg")
_VOC = Numbers({number: number for number in range(len(NAMES))}, none=[NO_CLASS])
_VOC_MASKS, _CONTEXT_MASKS = "semseg/VOC12", "semseg/pascal-context"
# By `image` and label, its folder and suffix; segmentation lies in one of two.
_FILES = {
    IMAGE: ("JPEGImages", ".jpg"),
    "human_parts": ("prepared/human_parts", ".png"),
    "normals": ("prepared/normals", ".png"),
    "saliency": ("sal_distill", ".png"),
    "edges": ("prepared/edges", ".png"),
}
# What each label is derived from; the first is the one that it depends on most.
SOURCES = {
    "human_parts": ("human_parts",),
    "normals": ("normals_distill", "pascal-context/trainval"),
    "edges": ("pascal-context/trainval",),
}


class PascalMt(PublicSet):
    """4,998 and 5,105 images. An image without people has no human parts; normals are another net's, where sensible."""

    layout = (
        "ImageSets/Context/{train,val}.txt, JPEGImages/*.jpg, semseg/{VOC12,pascal-context}/*.png, sal_distill/*.png,"
        " normals_distill/*.png, human_parts/*.mat, pascal-context/trainval/*.mat;"
        " prepared/{human_parts,normals,edges}/*.png, which `mtl data prepare` makes"
    )
    label_kinds: ClassVar[Mapping[str, tuple[LabelKind, ...]]] = {
        "segmentation": ("mask",),
        "human_parts": ("mask",),
        "normals": ("normals",),
        "saliency": ("mask",),
        "edges": ("mask",),
    }
    classes: Mapping[str, Sequence[str]] = {
        "segmentation": NAMES,
        "human_parts": PARTS,
        "saliency": ("background", "salient"),
        "edges": ("no edge", "edge"),
    }

    def __init__(self, settings: PublicDataConfig, split: str, kinds: Mapping[str, LabelKind]) -> None:
        super().__init__(settings, split, kinds)
        for label in self.wanted:
            if label in SOURCES and not self.folder.has(_FILES[label][0]):
                where = self.folder.root / _FILES[label][0]
                raise DataError(
                    f"{where}: no such folder; `mtl data prepare` makes it from {' and '.join(SOURCES[label])}"
                )
        self._names = self.folder.lines(f"ImageSets/Context/{split}.txt")
        if not self._names:
            raise self.folder.mistake(f"{self.folder.root}/ImageSets/Context/{split}.txt: expected names, got none")
        self._in_voc: set[str] = set()
        if "segmentation" in self.wanted and self.folder.has(_VOC_MASKS):
            self._in_voc = set(self.folder.names(_VOC_MASKS, ".png"))
        self.folder.check_files(
            self.file(index, name) for name in (IMAGE, *self.wanted) for index in range(len(self._names))
        )

    @classmethod
    def prepare(cls, settings: PublicDataConfig, log: Callable[[str], None]) -> None:
        """Derives human parts, normals and edges of all images; files that are there already stay.

        Raises:
            DataError: Another library is missing, a file is missing or cannot be read, or there is nothing to derive.
        """
        from mtl.data.files.sets.pascal_derived import derive

        folder = SetFolder(settings.root, cls.layout, settings.follow_links)
        names = [name for split in cls.splits for name in folder.lines(f"ImageSets/Context/{split}.txt")]
        derive(folder, names, {label: _FILES[label][0] for label in SOURCES}, SOURCES, log)

    def __len__(self) -> int:
        return len(self._names)

    def file(self, index: int, name: str) -> str:
        stem = self._names[index]
        if name == "segmentation":
            return f"{_VOC_MASKS if stem in self._in_voc else _CONTEXT_MASKS}/{stem}.png"
        folder, suffix = _FILES[name]
        return f"{folder}/{stem}{suffix}"

    def load(self, name: str, file: Path) -> Any:
        if name == IMAGE:
            return rgb(file)
        if name == "segmentation":
            return _VOC.read(file)
        if name == "human_parts":
            parts = read_mask(file)
            return parts if parts.any() else None
        return read_normals(file) if name == "normals" else above(file, 127.5)
