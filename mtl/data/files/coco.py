"""Data sets in COCO's format: masks from the outlines of objects, and tags from the objects in an image."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtl.config import SettingError
from mtl.config.file_data import CocoData, SplitName
from mtl.data.cache import DataError
from mtl.data.files.coco_masks import decode_counts, polygon_mask, run_length_mask
from mtl.data.files.fileset import IMAGE, FileSet
from mtl.data.files.mistakes import Mistakes
from mtl.data.files.paths import path_in, wrong_paths
from mtl.data.files.reading import read_image
from mtl.tasks.base import LabelKind

SEGMENTATION, TAGS = "segmentation", "tags"
COCO_LABELS: Mapping[str, LabelKind] = {SEGMENTATION: "mask", TAGS: "tags"}


@dataclass(frozen=True)
class Outline:
    """One object; it has polygons or run lengths, or neither if only tags are read.

    Attributes:
        number: Its place among the annotations, from 0.
        category: The place of its category, from 0.
        polygons: "p 2" each, float32.
        counts: Run lengths.
        size: Height and width that these have.
    """

    number: int
    category: int
    polygons: tuple[NDArray[np.float32], ...] = ()
    counts: str | tuple[int, ...] = ()
    size: tuple[int, int] = (0, 0)

    def mask(self, size: tuple[int, int]) -> NDArray[np.bool_]:
        """Its pixels; raises `ValueError` if the run lengths are those of another size, or none."""
        if self.polygons:
            mask = np.zeros(size, np.bool_)
            for polygon in self.polygons:
                mask |= polygon_mask(polygon, size)
            return mask
        if self.size != size:
            raise ValueError(
                f"expected run lengths of {size[0]} x {size[1]} pixels, got {self.size[0]} x {self.size[1]}"
            )
        counts = decode_counts(self.counts) if isinstance(self.counts, str) else self.counts
        return run_length_mask(counts, size)


@dataclass
class Picture:
    """An image of the data set.

    Attributes:
        path: Relative to the folder of images.
        size: Height and width in pixels.
        outlines: Of its objects, in the order of the annotations.
    """

    path: str
    size: tuple[int, int]
    outlines: list[Outline] = field(default_factory=list)


class Coco(FileSet):
    """One split: `segmentation`, 0 for background and categories from 1 by their ids; `tags`, those of the image."""

    def __init__(self, settings: CocoData, split: SplitName, kinds: Mapping[str, LabelKind]) -> None:
        """Reads the annotations; no image is opened.

        Args:
            settings: Where they are.
            split: Which split.
            kinds: What each label is: of `segmentation` a mask, and of `tags` tags.

        Raises:
            DataError: Something is wrong with the annotations: all of it in a line each.
            SettingError: There is no such split.
        """
        if split not in settings.places:
            raise SettingError(f"data.{split}", "this split is required here")
        self._file = Path(settings.places[split]).expanduser()
        self._folder, self._outside = Path(settings.folders[split]).expanduser(), settings.outside
        self.labels = tuple(kinds)
        mistakes = Mistakes()
        for label, kind in kinds.items():
            if COCO_LABELS.get(label) != kind:
                what = "masks as segmentation, and tags as tags"
                mistakes.add(f"COCO's annotations have {what}, got {label!r} as {kind}", label, COCO_LABELS, label)
        mistakes.check()
        content = _load(self._file)
        training = content if split == "train" else _load(Path(settings.train).expanduser())
        categories = _categories(training, Path(settings.train), mistakes)
        mistakes.check()
        names = tuple(categories.values())
        self.classes = {label: ("background", *names) if label == SEGMENTATION else names for label in kinds}
        self._num = len(names)
        with_masks = SEGMENTATION in kinds
        self._pictures = _pictures(content, self._file, list(categories), settings.outside, with_masks, mistakes)
        mistakes.check()

    def __len__(self) -> int:
        return len(self._pictures)

    def read(self, index: int, names: Collection[str]) -> dict[str, Any]:
        item: dict[str, Tensor] = {}
        for name in names:
            if name == TAGS:
                item[name] = self._tags(index)
            else:
                try:
                    item[name] = read_image(self.files(index)[IMAGE]) if name == IMAGE else self._mask(index)
                except DataError as error:
                    raise DataError(f"{self.where(index)}: {name}: {error}") from error
        return item

    def files(self, index: int) -> Mapping[str, Path]:
        return {IMAGE: path_in(self._folder, self._pictures[index].path, self._outside)}

    def column(self, label: str) -> Tensor | None:
        if label != TAGS or label not in self.labels:
            return None
        return torch.stack([self._tags(index) for index in range(len(self))]).double()

    def where(self, index: int) -> str:
        return f"{self._file}, {self._pictures[index].path}"

    def _tags(self, index: int) -> Tensor:
        tags = torch.zeros(self._num)
        tags[[outline.category for outline in self._pictures[index].outlines]] = 1
        return tags

    def _mask(self, index: int) -> Tensor:
        """The class of each pixel, "h w", uint8 or int32; of objects that overlap, that of the smaller or later one."""
        picture = self._pictures[index]
        classes = np.zeros(picture.size, np.uint8 if self._num < 256 else np.int32)
        masks = []
        for outline in picture.outlines:
            try:
                masks.append((outline.category + 1, outline.mask(picture.size)))
            except ValueError as error:
                raise DataError(f"annotation {outline.number}: {error}") from error
        for number, mask in sorted(masks, key=lambda each: -int(each[1].sum())):
            classes[mask] = number
        return torch.from_numpy(classes)


def _load(file: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: expected JSON, got an error: {error}") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{file}: expected lists of images, annotations and categories, got no {key}")
    return dict(content)


def _categories(content: Mapping[str, Any], file: Path, mistakes: Mistakes) -> dict[int, str]:
    """The names of the categories by their ids, in the order of these."""
    found = {}
    for number, each in enumerate(content["categories"]):
        try:
            found[int(each["id"])] = str(each["name"])
        except (KeyError, TypeError, ValueError, OverflowError):
            mistakes.add(f"{file}, category {number}: expected an id and a name, got {str(each)[:80]}")
    if len(found) < len(content["categories"]) and not len(mistakes):
        mistakes.add(f"{file}: several categories have the same id")
    if not found and not len(mistakes):
        mistakes.add(f"{file}: expected at least one category, got none")
    return dict(sorted(found.items()))


def _pictures(
    content: Mapping[str, Any],
    file: Path,
    categories: Sequence[int],
    outside: bool,
    with_masks: bool,
    mistakes: Mistakes,
) -> list[Picture]:
    """The images in the order of the file, with their objects."""
    pictures: dict[Any, Picture] = {}
    for number, each in enumerate(content["images"]):
        try:
            size = (int(each["height"]), int(each["width"]))
            if min(size) < 1 or each["id"] in pictures:
                raise ValueError
            pictures[each["id"]] = Picture(str(each["file_name"]), size)
        except (KeyError, TypeError, ValueError, OverflowError):
            what = "expected an id of its own, file_name, height and width"
            mistakes.add(f"{file}, image {number}: {what}, got {str(each)[:80]}")
    for _, what in wrong_paths([picture.path for picture in pictures.values()], outside):
        mistakes.add(f"{file}: {what}")
    if not content["images"]:
        mistakes.add(f"{file}: expected at least one image, got none")
    place_of = {category: place for place, category in enumerate(categories)}
    for number, each in enumerate(content["annotations"]):
        try:
            picture = pictures.get(each["image_id"])
            if picture is None:
                raise ValueError(f"expected the id of an image as image_id, got {each['image_id']!r}")
            picture.outlines.append(_outline(number, each, place_of, with_masks))
        except KeyError as error:
            mistakes.add(
                f"{file}, annotation {number}: expected a key {error}, got {', '.join(map(str, each)) or 'nothing'}"
            )
        except (TypeError, ValueError, OverflowError) as error:
            mistakes.add(f"{file}, annotation {number}: {error}")
    return list(pictures.values())


def _outline(number: int, annotation: Mapping[str, Any], place_of: Mapping[int, int], with_masks: bool) -> Outline:
    """An object; raises `KeyError`, `TypeError` or `ValueError` if the annotation is none."""
    category = place_of.get(annotation["category_id"])
    if category is None:
        raise ValueError(f"no category of training has the id {annotation['category_id']!r}")
    if not with_masks:
        return Outline(number, category)
    shape = annotation["segmentation"]
    if isinstance(shape, Mapping):
        counts, (height, width) = shape["counts"], shape["size"]
        if not isinstance(counts, str):
            counts = tuple(map(int, counts))
        return Outline(number, category, counts=counts, size=(int(height), int(width)))
    with np.errstate(over="ignore"):
        polygons = tuple(np.array(polygon, np.float32) for polygon in shape)
    if not polygons or any(len(p) < 6 or p.ndim != 1 or len(p) % 2 or not np.isfinite(p).all() for p in polygons):
        raise ValueError("expected a segmentation of polygons, each of three points or more as x, y, x, y, ...")
    return Outline(number, category, tuple(polygon.reshape(-1, 2) for polygon in polygons))
