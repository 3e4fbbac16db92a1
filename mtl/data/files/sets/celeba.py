"""`celeba`: faces with 40 attributes, as https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html publishes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mtl.config.public_data import PublicDataConfig
from mtl.data.cache import DataError
from mtl.data.files.fileset import IMAGE
from mtl.data.files.sets.base import PublicSet, rgb
from mtl.tasks.base import LabelKind

_IMAGES, _ATTRIBUTES, _PARTITION = (
    "Img/img_align_celeba",
    "Anno/list_attr_celeba.txt",
    "Eval/list_eval_partition.txt",
)
ATTRIBUTES = (
    *("5_o_Clock_Shadow", "Arched_Eyebrows", "Attractive", "Bags_Under_Eyes", "Bald", "Bangs", "Big_Lips", "Big_Nose"),
    *("Black_Hair", "Blond_Hair", "Blurry", "Brown_Hair", "Bushy_Eyebrows", "Chubby", "Double_Chin", "Eyeglasses"),
    *("Goatee", "Gray_Hair", "Heavy_Makeup", "High_Cheekbones", "Male", "Mouth_Slightly_Open", "Mustache"),
    *("Narrow_Eyes", "No_Beard", "Oval_Face", "Pale_Skin", "Pointy_Nose", "Receding_Hairline", "Rosy_Cheeks"),
    *("Sideburns", "Smiling", "Straight_Hair", "Wavy_Hair", "Wearing_Earrings", "Wearing_Hat", "Wearing_Lipstick"),
    *("Wearing_Necklace", "Wearing_Necktie", "Young"),
)
_ALL = "attributes"


class CelebA(PublicSet):
    """202,599 faces, 178 x 218. The label `attributes` is all 40; each attribute is a label of its own too, 0 or 1."""

    layout = f"{_IMAGES}/*.jpg, {_ATTRIBUTES}, {_PARTITION}"
    splits = ("train", "val", "test")
    label_kinds: ClassVar[Mapping[str, tuple[LabelKind, ...]]] = {
        _ALL: ("tags",),
        **dict.fromkeys(ATTRIBUTES, ("class", "tags")),
    }
    classes: Mapping[str, Sequence[str]] = {
        _ALL: ATTRIBUTES,
        **{name: (f"not {name}", name) for name in ATTRIBUTES},
    }

    def __init__(self, settings: PublicDataConfig, split: str, kinds: Mapping[str, LabelKind]) -> None:
        super().__init__(settings, split, kinds)
        self._as_tags = {label for label, kind in kinds.items() if kind == "tags"}
        names, numbers = self._partition()
        is_here = numbers == self.splits.index(split)
        self._names = [name for name, is_wanted in zip(names, is_here.tolist(), strict=True) if is_wanted]
        self._values = self._attributes(names)[is_here]
        if not self._names:
            raise self.folder.mistake(f"{self.folder.root / _PARTITION}: no image is in the split {split!r}")
        self.folder.check_files(f"{_IMAGES}/{name}" for name in self._names)

    def __len__(self) -> int:
        return len(self._names)

    def file(self, index: int, name: str) -> str | None:
        return f"{_IMAGES}/{self._names[index]}" if name == IMAGE else None

    def load(self, name: str, file: Path) -> Any:  # noqa: ARG002  only images are files
        return rgb(file)

    def column(self, label: str) -> Tensor:
        """Attributes of all images, "n 40" or "n", or "n 1" for an attribute that is taken as tags."""
        if label == _ALL:
            return torch.from_numpy(self._values).double()
        place = ATTRIBUTES.index(label)
        values = self._values[:, place : place + 1] if label in self._as_tags else self._values[:, place]
        return torch.from_numpy(values).double()

    def _value(self, index: int, name: str) -> Any:
        if name == IMAGE:
            return super()._value(index, name)
        if name == _ALL:
            return self._values[index].astype(float).tolist()
        value = int(self._values[index, ATTRIBUTES.index(name)])
        return [float(value)] if name in self._as_tags else value

    def _partition(self) -> tuple[list[str], np.ndarray[Any, np.dtype[np.int64]]]:
        """The names of all images, and the number of each one's split."""
        # All words at once: a list for each of 200,000 lines would cost seconds.
        words = " ".join(self.folder.lines(_PARTITION)).split()
        names, numbers = words[::2], words[1::2]
        if len(names) != len(numbers) or not {"0", "1", "2"}.issuperset(numbers):
            where = self.folder.root / _PARTITION
            raise DataError(f"{where}: expected a name and 0 (train), 1 (val) or 2 (test) in each line")
        return names, np.array(numbers, dtype=np.int64)

    def _attributes(self, names: Sequence[str]) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The attributes of all images, "n 40": 1 where the list has 1, 0 where it has -1.

        Args:
            names: The images, in the order of the partition, which is that of the attributes too.
        """
        where = self.folder.root / _ATTRIBUTES
        lines = self.folder.lines(_ATTRIBUTES)
        if len(lines) < 3 or tuple(lines[1].split()) != ATTRIBUTES:
            raise DataError(f"{where}: expected the number of images, then CelebA's 40 attributes, each in a line")
        rows = lines[2:]
        if lines[0] != str(len(rows)):
            raise DataError(f"{where}: expected {lines[0]} images, as its first line says, got {len(rows)}")
        if len(rows) != len(names):
            raise DataError(f"{where}: expected the {len(names)} images of {_PARTITION}, got {len(rows)}")
        digits = []
        for name, row in zip(names, rows, strict=True):
            digits.append(row[len(name) :].replace("-1", "0").replace(" ", ""))
            if not row.startswith(name) or len(digits[-1]) != len(ATTRIBUTES) or digits[-1].strip("01"):
                raise DataError(f"{where}: expected {name} and 40 times 1 or -1, got {row}")
        values = np.frombuffer("".join(digits).encode(), dtype=np.uint8) - ord("0")
        return values.reshape(len(rows), len(ATTRIBUTES))
