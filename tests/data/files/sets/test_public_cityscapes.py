"""`cityscapes`: ids become the 19 classes, disparity gets its unit, and cities are checked one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from public_trees import colours, opened, put

from mtl.data import DataError

SIZE = (8, 16)


def cityscapes(root: Path) -> Path:
    for split, cities in (("train", {"ulm": 2, "aachen": 3}), ("val", {"lindau": 1})):
        for city, num in cities.items():
            for number in range(num):
                name = f"{city}/{city}_{number:06d}_000019"
                put(root / f"leftImg8bit/{split}/{name}_leftImg8bit.png", colours(*SIZE, number))
                ids = np.arange(SIZE[0] * SIZE[1], dtype=np.uint8).reshape(SIZE) % 34
                put(root / f"gtFine/{split}/{name}_gtFine_labelIds.png", ids)
                put(root / f"gtFine/{split}/{name}_gtFine_color.png", ids)
                stored = np.zeros(SIZE, np.uint16)
                stored[0, :3] = 1, 257, 32769
                put(root / f"disparity/{split}/{name}_disparity.png", stored)
    return root


# From helpers/labels.py of cityscapesScripts, written out.
TRAIN_ID = {
    7: 0,
    8: 1,
    11: 2,
    12: 3,
    13: 4,
    17: 5,
    19: 6,
    20: 7,
    21: 8,
    22: 9,
    23: 10,
    24: 11,
    25: 12,
    26: 13,
    27: 14,
    28: 15,
    31: 16,
    32: 17,
    33: 18,
}


def test_an_item_is_read_in_the_19_classes_and_in_pixels(tmp_path: Path) -> None:
    data = opened("cityscapes", cityscapes(tmp_path), "train")
    assert [data.where(i).removeprefix(f"{tmp_path}/leftImg8bit/train/") for i in range(len(data))] == [
        *(f"aachen/aachen_00000{i}_000019_leftImg8bit.png" for i in range(3)),
        *(f"ulm/ulm_00000{i}_000019_leftImg8bit.png" for i in range(2)),
    ]
    item = data[4]
    assert torch.equal(item["image"], torch.from_numpy(colours(*SIZE, 1)).permute(2, 0, 1))
    expected = [TRAIN_ID.get(place % 34, 255) for place in range(SIZE[0] * SIZE[1])]
    assert item["segmentation"].flatten().tolist() == expected
    assert item["disparity"].shape == (1, *SIZE)
    assert item["disparity"][0, 0, :4].tolist() == [0, 1, 128, 0]
    assert [data.classes["segmentation"][n] for n in (0, 10, 18)] == ["road", "sky", "bicycle"]


def test_a_city_that_lacks_a_file_is_named(tmp_path: Path) -> None:
    (cityscapes(tmp_path) / "gtFine/train/ulm/ulm_000001_000019_gtFine_labelIds.png").unlink()
    message = (
        "gtFine/train/ulm: expected the names of the 2 files of leftImg8bit/train/ulm, got 1; gtFine/train/ulm has no"
    )
    with pytest.raises(DataError, match=message):
        opened("cityscapes", tmp_path, "train")
    assert len(opened("cityscapes", tmp_path, "train", {"disparity": "depth"})) == 5
    assert len(opened("cityscapes", tmp_path, "val")) == 1


def test_ids_that_cityscapes_has_not_are_refused(tmp_path: Path) -> None:
    put(
        cityscapes(tmp_path) / "gtFine/val/lindau/lindau_000000_000019_gtFine_labelIds.png",
        np.full(SIZE, 255, np.uint8),
    )
    with pytest.raises(DataError, match=r"labelIds\.png: expected the numbers 0, 1, .*, 33, got 255"):
        opened("cityscapes", tmp_path, "val")[0]


def test_a_split_without_cities_is_refused(tmp_path: Path) -> None:
    (tmp_path / "leftImg8bit/train").mkdir(parents=True)
    with pytest.raises(DataError, match="leftImg8bit/train: no city in it; expected layout: leftImg8bit/"):
        opened("cityscapes", tmp_path, "train")
    with pytest.raises(DataError, match="cityscapes has no split 'test'; it has train, val"):
        opened("cityscapes", tmp_path, "test")
