"""Data sets in the formats of other libraries that need no code: Hugging Face's datasets, shards of webdataset."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator
from pydantic_core import PydanticCustomError

from mtl.config.file_data import Name, SplitConfig, SplitFiles, check_division
from mtl.config.types import Positive


class HuggingFaceData(SplitFiles):
    """A data set of Hugging Face's `datasets`, which needs `mtl-freeze[datasets]`; see docs/table.md.

    Attributes:
        name: The data set's name.
        path: A folder written by `save_to_disk`; a Parquet file; a folder of Parquet files or images as `load_dataset`
            takes it; or the name of a data set on the hub, `owner/name`, from the local cache or the network.
        config: The configuration of a data set that has several; refused with what `save_to_disk` wrote.
        train: The training split by its name, or a part of it: `train[:90%]`.
        val: The validation split; refused with `split`.
        test: The test split, if there is one; refused with `split`.
        image: The column of the images.
        split: Divides the split `train` by a column instead of `val` and `test`.
        scale: Metres of one unit of a depth, by label; 1 if not set.
        outside: Whether images that lie in files of their own may do so outside of `path` and of the library's cache.
    """

    name: Literal["huggingface"]
    path: Name
    config: Name | None = None
    train: Name = "train"
    image: Name = "image"
    split: SplitConfig | None = None
    scale: dict[str, Positive] = {}
    outside: bool = False

    @model_validator(mode="after")
    def _has_one_validation_split(self) -> HuggingFaceData:
        check_division(self, self.split, "the split train")
        if self.split is not None and self.split.by == "hash":
            what = "Input should have split by: column; by place, write train: train[:90%] and val: train[90%:]"
            raise PydanticCustomError("data", what)
        return self


class WebDatasetData(SplitFiles):
    """Shards of webdataset, which needs `mtl-freeze[webdataset]`; see docs/table.md.

    Attributes:
        name: The data set's name.
        train: The training shards, with braces as webdataset has them: `train-{000..003}.tar`; several lists are joined
            by `::`.
        val: The validation shards; refused with `split`.
        test: The test shards, if there are any; refused with `split`.
        image: The extension of the images; of several, joined by `;`, the first one that a sample has.
        labels: The extension of the member that holds a label, by label; or several, as for `image`. A label that is
            not here is itself the extension, or a field of the member `json`.
        split: Divides the shards `train` by the samples' keys instead of `val` and `test`.
        scale: Metres of one unit of a depth, by label; 1 if not set.
    """

    name: Literal["webdataset"]
    image: Name = "jpg;png"
    labels: dict[str, Name] = {}
    split: SplitConfig | None = None
    scale: dict[str, Positive] = {}

    @model_validator(mode="after")
    def _has_one_validation_split(self) -> WebDatasetData:
        check_division(self, self.split, "the shards train")
        if self.split is not None and self.split.by == "column":
            raise PydanticCustomError("data", "Input should have split by: hash; shards have no columns")
        return self
