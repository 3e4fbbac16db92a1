"""The settings of data sets in files: each mistake is one, and what is right is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from data_settings import SETTINGS
from mtl.config.file_data import CocoData, TableData
from mtl.data.files.table import Table
from mtl.tasks.base import LabelKind
from pages import code_block, code_blocks

TABLE = {"name": "table", "train": "a.csv", "val": "b.csv"}
FOLDER = {"name": "folder", "train": "a", "val": "b"}
COCO = {"name": "coco", "train": "a.json", "val": "b.json", "images": "i"}
HUB = {"name": "huggingface", "path": "a"}
SHARDS = {"name": "webdataset", "train": "a.tar"}
ONE = {"name": "table", "train": "a.csv"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (ONE, "should have val, or split to divide the table train"),
        (TABLE | {"split": {"by": "column"}}, "should have no val and test with split, which divides train"),
        (ONE | {"test": "a.csv", "split": {"by": "column"}}, "should have no val and test with split"),
        (ONE | {"split": {"by": "hash"}}, "should have val, the share of images that validate"),
        (ONE | {"split": {"by": "hash", "val": 0.5, "test": 0.5}}, "should have val and test of less than 1 together"),
        (ONE | {"split": {"by": "hash", "val": 0.5, "column": "a"}}, "should have a column only with by: column"),
        (ONE | {"split": {"by": "column", "val": 0.5}}, "should have shares, val and test, only with by: hash"),
        (ONE | {"split": {"by": "hash", "val": 1.0}}, "should be less than 1"),
        (ONE | {"split": {"by": "row"}}, "should be 'column' or 'hash'"),
        (TABLE | {"scale": {"depth": 0.0}}, "should be greater than 0"),
        (TABLE | {"images": "i"}, "Extra inputs are not permitted"),
        (TABLE | {"image": ""}, "should have at least 1 character"),
        (FOLDER | {"images": "i"}, "should have both images and masks, or none of them"),
        (FOLDER | {"masks": {"a": "b"}}, "should have both images and masks, or none of them"),
        (FOLDER | {"images": "i", "masks": {}}, "should have at least 1 item"),
        ({"name": "folder", "train": "a"}, "Field required"),
        (COCO | {"images": {"train": "t"}}, "should have a folder of images for each of train, val and test"),
        (COCO | {"images": {"train": "t", "vall": "v"}}, "should be 'train', 'val' or 'test'"),
        (COCO | {"images": 3}, "should be a valid string"),
        (HUB, "should have val, or split to divide the split train"),
        (HUB | {"val": "b", "split": {"by": "column"}}, "should have no val and test with split, which divides train"),
        (HUB | {"split": {"by": "hash", "val": 0.5}}, "should have split by: column; by place, write train: train"),
        ({"name": "huggingface", "val": "b"}, "Field required"),
        (SHARDS, "should have val, or split to divide the shards train"),
        (SHARDS | {"split": {"by": "column"}}, "should have split by: hash; shards have no columns"),
        (SHARDS | {"val": "b.tar", "labels": {"a": ""}}, "should have at least 1 character"),
        (SHARDS | {"val": "b.tar", "outside": True}, "Extra inputs are not permitted"),
    ],
)
def test_a_mistake_in_the_settings_is_reported(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as error:
        SETTINGS[settings["name"]].model_validate(settings)
    (only,) = [found for found in error.value.errors() if message in found["msg"]]
    assert only


def test_a_split_column_is_called_split_unless_it_has_a_name() -> None:
    for split, name in (({"by": "column"}, "split"), ({"by": "column", "column": "part"}, "part")):
        found = TableData.model_validate(ONE | {"split": split}).split
        assert found is not None and found.column_name == name


def test_each_split_has_its_place_and_folder() -> None:
    one = CocoData.model_validate(COCO | {"test": "c.json"})
    assert one.places == {"train": "a.json", "val": "b.json", "test": "c.json"}
    assert one.folders == {"train": "i", "val": "i", "test": "i"}
    several = CocoData.model_validate(COCO | {"images": {"train": "t", "val": "v"}})
    assert several.folders == {"train": "t", "val": "v"}


# The page

PAGE = "docs/table.md"
SHOWN = [
    yaml.safe_load(block)["data"]
    for text in code_blocks(PAGE, "yaml")
    for block in ([text] if "\ntasks:" in text else text.splitlines())
]


def test_the_page_shows_each_data_set() -> None:
    assert [data["name"] for data in SHOWN] == [
        *["table"] * 3,
        *["folder"] * 2,
        "coco",
        *["huggingface"] * 4,
        *["webdataset"] * 2,
    ]


@pytest.mark.parametrize("data", SHOWN, ids=str)
def test_settings_of_the_page_are_read(data: dict[str, Any]) -> None:
    SETTINGS[data["name"]].model_validate(data)


def test_the_table_of_the_page_is_read(tmp_path: Path) -> None:
    for name in ("train", "val"):
        (tmp_path / f"birds/{name}.csv").parent.mkdir(exist_ok=True)
        (tmp_path / f"birds/{name}.csv").write_text(code_block(PAGE, "csv"))
    places = {name: str(tmp_path / SHOWN[0][name]) for name in ("train", "val")}
    kinds: dict[str, LabelKind] = {"species": "class", "outline": "mask", "distance": "depth"}
    data = Table(TableData.model_validate(SHOWN[0] | places), "train", kinds)
    assert data.classes == {"species": ("jay", "owl")}
    assert [sorted(data.files(index)) for index in range(3)] == [
        ["distance", "image", "outline"],
        ["image"],
        ["image", "outline"],
    ]
