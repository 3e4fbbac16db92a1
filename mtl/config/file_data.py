"""Data sets in files of the user's own that need no code: tables, folders of images, COCO's annotations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from mtl.config.data import FileData
from mtl.config.types import Positive, Strict

Name = Annotated[str, Field(min_length=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
SplitName = Literal["train", "val", "test"]

SPLITS: tuple[SplitName, ...] = ("train", "val", "test")


class SplitConfig(Strict):
    """How the rows of one table are divided into training, validation and test.

    Attributes:
        by: `column` reads `train`, `val` or `test` from a column; `hash` draws by the image's path, so that a row stays
            where it is when others are added or the order changes, and rows of one image stay together.
        column: The name of that column; `split` if not set. Refused with `hash`.
        val: With `hash`, the share of images that validate.
        test: With `hash`, the share of images kept for testing; if not set, none.
    """

    by: Literal["column", "hash"]
    column: Name | None = None
    val: Share | None = None
    test: Share | None = None

    @property
    def column_name(self) -> str:
        return self.column or "split"

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> SplitConfig:
        if self.by == "column" and (self.val is not None or self.test is not None):
            raise PydanticCustomError("split", "Input should have shares, val and test, only with by: hash")
        if self.by == "hash" and self.column is not None:
            raise PydanticCustomError("split", "Input should have a column only with by: column")
        if self.by == "hash" and self.val is None:
            raise PydanticCustomError("split", "Input should have val, the share of images that validate")
        if (self.val or 0) + (self.test or 0) >= 1:
            raise PydanticCustomError("split", "Input should have val and test of less than 1 together")
        return self


class SplitFiles(FileData):
    """The common keys of data sets in files.

    Attributes:
        train: Where the training split is.
        val: Where the validation split is.
        test: Where the test split is, if there is one.
    """

    train: Name
    val: Name | None = None
    test: Name | None = None

    @property
    def places(self) -> Mapping[SplitName, str]:
        """Where each split is, of those there are."""
        found = {"train": self.train, "val": self.val, "test": self.test}
        return {split: place for split in SPLITS if (place := found[split]) is not None}


def check_division(data: SplitFiles, split: SplitConfig | None, what: str) -> None:
    """Raises `PydanticCustomError` unless there is either a validation split or a `split` that divides `what`."""
    if split is None and data.val is None:
        raise PydanticCustomError("data", f"Input should have val, or split to divide {what}")
    if split is not None and (data.val is not None or data.test is not None):
        raise PydanticCustomError("data", "Input should have no val and test with split, which divides train")


class TableData(SplitFiles):
    """A table with a row for each image, and a column for each label; see docs/table.md.

    Attributes:
        name: The data set's name.
        train: The training table: CSV, or Parquet if it ends in `.parquet`, which needs `mtl-freeze[parquet]`.
        val: The validation table; refused with `split`.
        test: The test table, if there is one; refused with `split`.
        image: The column with the images' paths, relative to the table's folder.
        split: Divides the table `train` instead of `val` and `test`.
        scale: Metres of one unit of a depth, by label; 1 if not set.
        outside: Whether paths may leave the table's folder: absolute ones, `..`, and links.
    """

    name: Literal["table"]
    image: Name = "image"
    split: SplitConfig | None = None
    scale: dict[str, Positive] = {}
    outside: bool = False

    @model_validator(mode="after")
    def _has_one_validation_split(self) -> TableData:
        check_division(self, self.split, "the table train")
        return self


class FolderData(SplitFiles):
    """Folders of images: one for each class, or `images` with folders of masks next to it; see docs/table.md.

    Attributes:
        name: The data set's name.
        train: The folder of the training split.
        val: The folder of the validation split.
        test: The folder of the test split, if there is one.
        images: The folder of images in that of the split; if not set, each folder in it is a class.
        masks: The folder with files of a label, by label: masks, depths or normals, named as the images are.
        scale: Metres of one unit of a depth, by label; 1 if not set.
        outside: Whether links may leave the split's folder.
    """

    name: Literal["folder"]
    val: Name
    images: Name | None = None
    masks: Annotated[dict[str, Name], Field(min_length=1)] | None = None
    scale: dict[str, Positive] = {}
    outside: bool = False

    @model_validator(mode="after")
    def _has_labels(self) -> FolderData:
        if (self.images is None) != (self.masks is None):
            raise PydanticCustomError("data", "Input should have both images and masks, or none of them")
        return self


def _is_by_split(value: object) -> str:
    return "by split" if isinstance(value, dict) else "one"


class CocoData(SplitFiles):
    """Annotations in COCO's format; see docs/table.md.

    Attributes:
        name: The data set's name.
        train: The annotations of the training split, such as `instances_train2017.json`.
        val: Those of the validation split.
        test: Those of the test split, if there is one.
        images: The folder of the images, or one for each split: `{train: train2017, val: val2017}`.
        outside: Whether paths may leave the folder of the images: absolute ones, `..`, and links.
    """

    name: Literal["coco"]
    val: Name
    images: Annotated[
        Annotated[Name, Tag("one")] | Annotated[dict[SplitName, Name], Tag("by split")], Discriminator(_is_by_split)
    ]
    outside: bool = False

    @property
    def folders(self) -> Mapping[SplitName, str]:
        """The folder of the images of each split there is."""
        images = self.images
        return {split: images if isinstance(images, str) else images[split] for split in self.places}

    @model_validator(mode="after")
    def _has_all_folders(self) -> CocoData:
        if isinstance(self.images, dict) and set(self.images) != set(self.places):
            raise PydanticCustomError("data", "Input should have a folder of images for each of train, val and test")
        return self
