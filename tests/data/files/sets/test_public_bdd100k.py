"""`bdd100k`: two sets of images with labels of their own, lane masks bit by bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from public_trees import colours, opened, put

from mtl.data import DataError

SIZE = (6, 10)
# Direction, style and category of a lane, and its byte; then background.
LANES = [((0, 0, 0), 0b000000), ((1, 0, 7), 0b100111), ((0, 1, 4), 0b010100), ((1, 1, 6), 0b110110)]


def bdd100k(root: Path) -> Path:
    images = {
        "100k": {"train": ["aa", "bb", "cc"], "val": ["dd", "ee"]},
        "10k": {"train": ["aa", "dd", "ff"], "val": ["bb", "gg"]},
    }
    for subset, splits in images.items():
        for split, names in splits.items():
            for name in names:
                put(root / f"images/{subset}/{split}/{name}.jpg", colours(*SIZE, len(subset)))
                if subset == "10k":
                    mask = np.array([*range(19), 255], np.uint8).repeat(3).reshape(SIZE)
                    put(root / f"labels/sem_seg/masks/{split}/{name}.png", mask)
                    continue
                put(
                    root / f"labels/drivable/masks/{split}/{name}.png",
                    (np.arange(60) % 3).astype(np.uint8).reshape(SIZE),
                )
                lanes = np.full(60, 0b1000, np.uint8)
                lanes[:4], lanes[4] = [byte for _, byte in LANES], 255
                put(root / f"labels/lane/masks/{split}/{name}.png", lanes.reshape(SIZE))
    return root


def test_drivable_area_and_lanes_are_on_the_larger_set(tmp_path: Path) -> None:
    kinds = dict.fromkeys(("drivable", "lane_category", "lane_direction", "lane_style"), "mask")
    data = opened("bdd100k", bdd100k(tmp_path), "train", kinds)  # type: ignore[arg-type]
    assert [data.where(index) for index in range(len(data))] == [
        str(tmp_path / f"images/100k/train/{name}.jpg") for name in ("aa", "bb", "cc")
    ]
    item = data[0]
    assert item.keys() == {"image", *kinds}
    assert item["drivable"].flatten().tolist() == [place % 3 for place in range(60)]
    for label, place, background in (("lane_direction", 0, 2), ("lane_style", 1, 2), ("lane_category", 2, 8)):
        assert item[label].flatten().tolist() == [*(lane[place] for lane, _ in LANES), *[background] * 56]
        assert data.classes[label][background] == "background"


def test_segmentation_is_on_the_smaller_set(tmp_path: Path) -> None:
    data = opened("bdd100k", bdd100k(tmp_path), "train", {"segmentation": "mask"})
    assert len(data) == 3
    assert data[0].keys() == {"image", "segmentation"}
    assert data[0]["segmentation"].flatten().tolist() == [number for number in [*range(19), 255] for _ in range(3)]
    assert len(data.classes["segmentation"]) == 19


def test_of_both_sets_each_image_has_its_own_labels_and_no_validation_image_is_trained_on(tmp_path: Path) -> None:
    data = opened("bdd100k", bdd100k(tmp_path), "train", {"drivable": "mask", "segmentation": "mask"})
    places = [data.where(index).removeprefix(f"{tmp_path}/images/") for index in range(len(data))]
    # bb is in the smaller set's val, dd in the larger one's.
    assert places == ["100k/train/aa.jpg", "100k/train/cc.jpg", "10k/train/aa.jpg", "10k/train/ff.jpg"]
    assert data[0].keys() == {"image", "drivable"}
    assert data[3].keys() == {"image", "segmentation"}
    assert data.files(3).keys() == {"image", "segmentation"}
    assert len(opened("bdd100k", tmp_path, "val", {"drivable": "mask", "segmentation": "mask"})) == 4


def test_masks_that_do_not_fit_the_images_are_refused(tmp_path: Path) -> None:
    (bdd100k(tmp_path) / "labels/lane/masks/train/bb.png").unlink()
    with pytest.raises(
        DataError, match="lane/masks/train: expected the names of the 3 files of images/100k/train, got"
    ):
        opened("bdd100k", tmp_path, "train", {"lane_style": "mask"})
    assert len(opened("bdd100k", tmp_path, "train", {"drivable": "mask"})) == 3
    put(tmp_path / "labels/drivable/masks/train/aa.png", np.full(SIZE, 3, np.uint8))
    with pytest.raises(DataError, match=r"drivable/masks/train/aa\.png: expected the numbers 0, 1, 2, got 3"):
        opened("bdd100k", tmp_path, "train", {"drivable": "mask"})[0]
    put(tmp_path / "labels/sem_seg/masks/val/gg.png", np.full(SIZE, 19, np.uint8))
    with pytest.raises(DataError, match=r"masks/val/gg\.png: expected the numbers 0, 1, .*, 18, 255, got 19"):
        opened("bdd100k", tmp_path, "val", {"segmentation": "mask"})[1]
    assert torch.is_tensor(opened("bdd100k", tmp_path, "train", {"drivable": "mask"})[1]["drivable"])
