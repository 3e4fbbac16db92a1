"""`nyuv2_mtan` and `cityscapes_mtan`: one array for each image and label, as MTAN published them.

Layout and conventions: https://github.com/lorenmt/mtan (Liu et al., arXiv 1803.10704), read by LibMTL, CAGrad, Nash-MTL
and FAMO too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from mtl.config.public_data import CityscapesMtanConfig, PublicDataConfig
from mtl.data.cache import DataError
from mtl.data.files.fileset import IMAGE
from mtl.data.files.reading import read_depth, read_image, read_mask, read_normals
from mtl.data.files.sets.base import NO_CLASS, PublicSet
from mtl.tasks.base import LabelKind


class MtanSet(PublicSet):
    """`<split>/<folder>/<i>.npy`. What is called `val` here is what the papers report as their test set."""

    # By `image` and label, the name of its folder.
    folders: ClassVar[Mapping[str, str]]

    def __init__(self, settings: PublicDataConfig, split: str, kinds: Mapping[str, LabelKind]) -> None:
        super().__init__(settings, split, kinds)
        self._folders = {name: f"{split}/{folder}" for name, folder in self.folder_names(settings, split).items()}
        names = {self._folders[name]: self.folder.names(self._folders[name], ".npy") for name in (IMAGE, *self.wanted)}
        self.folder.check_same(names)
        self._names = names[self._folders[IMAGE]]

    def folder_names(self, settings: PublicDataConfig, split: str) -> Mapping[str, str]:  # noqa: ARG002  one set needs it
        return self.folders

    def __len__(self) -> int:
        return len(self._names)

    def file(self, index: int, name: str) -> str:
        return f"{self._folders[name]}/{self._names[index]}.npy"

    def load(self, name: str, file: Path) -> Any:
        if name == "segmentation":
            return _classes(file)
        if name == IMAGE:
            return read_image(file)
        return read_depth(file) if name == "depth" else read_normals(file)


class NyuV2Mtan(MtanSet):
    """NYUv2 at 288 x 384, 795 and 654 images: 13 classes, depth in metres, normals."""

    layout = "{train,val}/{image,label,depth,normal}/{0,1,...}.npy"
    label_kinds: ClassVar = {"segmentation": ("mask",), "depth": ("depth",), "normals": ("normals",)}
    folders: ClassVar = {IMAGE: "image", "segmentation": "label", "depth": "depth", "normals": "normal"}
    # The order of https://github.com/ankurhanda/SceneNetv1.0, from which MTAN took its labels.
    classes: Mapping[str, Sequence[str]] = {
        "segmentation": (
            *("bed", "books", "ceiling", "chair", "floor", "furniture", "objects", "picture", "sofa", "table", "tv"),
            *("wall", "window"),
        )
    }


class CityscapesMtan(MtanSet):
    """Cityscapes at 128 x 256 or 256 x 512, 2,975 and 500 images: 7 classes (or 2, or 19), inverse depth."""

    layout = "{train,val}/{image,label_7,depth}/{0,1,...}.npy (also label_2 or label_19; label in LibMTL's copy)"
    label_kinds: ClassVar = {"segmentation": ("mask",), "depth": ("depth",)}
    folders: ClassVar = {IMAGE: "image", "depth": "depth"}

    def folder_names(self, settings: PublicDataConfig, split: str) -> Mapping[str, str]:
        assert isinstance(settings, CityscapesMtanConfig)
        label = f"label_{settings.num_classes}"
        if settings.num_classes == 7 and not self.folder.has(f"{split}/{label}") and self.folder.has(f"{split}/label"):
            label = "label"
        return {**self.folders, "segmentation": label}


def _classes(file: Path) -> Tensor:
    """Class numbers "h w", uint8, where the file has -1 for none."""
    stored = read_mask(file).int()
    low, high = stored.aminmax()
    if low < -1 or high > NO_CLASS:
        raise DataError(f"{file}: expected class numbers, -1 for none, got {int(low)} to {int(high)}")
    return torch.where(stored < 0, NO_CLASS, stored).to(torch.uint8)
