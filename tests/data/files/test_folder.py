"""Data sets of folders: a folder for each class, or images with folders of masks next to them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from mtl.config import SettingError
from mtl.config.file_data import FolderData, SplitName
from mtl.data.cache import DataError
from mtl.data.files.folder import Folder, folder_labels
from mtl.data.files.problems import problems
from mtl.tasks.base import LabelKind
from tables import picture

CLASS: Mapping[str, LabelKind] = {"class": "class"}
MASKS: Mapping[str, LabelKind] = {"segmentation": "mask", "depth": "depth"}
SETTINGS = {"images": "images", "masks": {"segmentation": "masks", "depth": "depths"}}


def folder(root: Path, kinds: Mapping[str, LabelKind] = CLASS, which: SplitName = "train", **settings: Any) -> Folder:
    places = {"name": "folder", "train": str(root / "train"), "val": str(root / "val")}
    return Folder(FolderData.model_validate(places | settings), which, kinds)


def whats_wrong(root: Path, *arguments: Any, **settings: Any) -> list[str]:
    with pytest.raises(DataError) as error:
        folder(root, *arguments, **settings)
    return str(error.value).replace(f"{root}/", "").splitlines()


def test_each_folder_is_a_class(tmp_path: Path) -> None:
    for name in ("train/dog/b.png", "train/cat/2/a.jpg", "train/cat/1.png", "val/dog/x.png"):
        picture(tmp_path / name)
    for name in ("train/dog/notes.txt", "train/dog/.hidden.png", "train/.git/a.png", "train/readme.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no image")
    train, val = folder(tmp_path), folder(tmp_path, which="val")
    assert [train.where(n).removeprefix(f"{tmp_path}/train/") for n in range(3)] == [
        "cat/1.png",
        "cat/2/a.jpg",
        "dog/b.png",
    ]
    assert train.classes == val.classes == {"class": ("cat", "dog")}
    for data, expected in ((train, [0, 0, 1]), (val, [1])):
        column = data.column("class")
        assert column is not None and column.tolist() == expected
        assert [int(data[index]["class"]) for index in range(len(data))] == expected
    assert train[0]["image"].shape == (1, 3, 4) and train[0]["class"].dtype == torch.int64
    assert list(problems(train, CLASS)) == []


def test_the_only_task_learns_the_class_whatever_its_name(tmp_path: Path) -> None:
    picture(tmp_path / "train/a/1.png")
    data = folder(tmp_path, {"species": "class"})
    assert data.labels == ("species",) and data[0].keys() == {"image", "species"}
    settings = FolderData(name="folder", train="train", val="val")
    assert folder_labels(settings, ["species"]) == ("species",)
    assert folder_labels(settings, ["species", "species"]) == ("species",)
    assert folder_labels(settings, ["species", "age"]) == ("class",)


def test_files_of_masks_belong_to_the_image_of_the_same_name(tmp_path: Path) -> None:
    picture(tmp_path / "train/images/a/1.jpg", (9, 9, 9), mode="RGB")
    picture(tmp_path / "train/images/2.png")
    picture(tmp_path / "train/masks/a/1.png", 3)
    picture(tmp_path / "train/depths/a/1.png", 250, mode="I;16")
    picture(tmp_path / "train/depths/2.png", 500, mode="I;16")
    data = folder(tmp_path, MASKS, scale={"depth": 0.01}, **SETTINGS)
    assert len(data) == 2 and data.column("segmentation") is None
    assert data[0].keys() == {"image", "depth"} and data[1].keys() == {"image", "depth", "segmentation"}
    assert (data[0]["depth"] == 5).all() and (data[1]["depth"] == 2.5).all() and (data[1]["segmentation"] == 3).all()
    assert data.files(0) == {name: tmp_path / f"train/{name}s/2.png" for name in ("image", "depth")}
    assert folder_labels(FolderData.model_validate({"name": "folder", "train": "a", "val": "b"} | SETTINGS), ["x"]) == (
        "segmentation",
        "depth",
    )
    picture(tmp_path / "train/masks/2.png", size=(4, 4))
    (line,) = problems(folder(tmp_path, MASKS, **SETTINGS), MASKS)
    assert line.endswith("masks/2.png: expected the image's size, 4 x 3 pixels, got 4 x 4")


def test_labels_that_folders_do_not_have(tmp_path: Path) -> None:
    picture(tmp_path / "train/a/1.png")
    assert whats_wrong(tmp_path, {"clas": "class", "depth": "depth"}) == [
        "the data set has no label 'clas'; it has class; nearest: class",
        "the data set has no label 'depth'; it has class",
    ]
    assert whats_wrong(tmp_path, {"depth": "depth"}) == ["the label 'depth' is a class here, and the task learns depth"]
    assert whats_wrong(tmp_path, {"segmentation": "class"}, **SETTINGS) == [
        "the label 'segmentation' is a mask or depth or normals here, and the task learns class"
    ]
    with pytest.raises(SettingError, match=r"^data.scale.segmentation: expected .* as a depth, depth$"):
        folder(tmp_path, MASKS, scale={"segmentation": 1.0}, **SETTINGS)
    with pytest.raises(SettingError, match=r"^data.test: this split is required here$"):
        folder(tmp_path, which="test")


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    assert whats_wrong(tmp_path) == ["train: No such file or directory"]
    (tmp_path / "train/cat").mkdir(parents=True)
    assert whats_wrong(tmp_path) == ["train/cat: expected an image, got none"]
    picture(tmp_path / "train/cat/1.png")
    picture(tmp_path / "val/cta/1.png")
    assert whats_wrong(tmp_path, which="val") == ["val/cta: class 'cta' is never seen in training; nearest: cat"]


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    for name in ("images/1.png", "images/1.jpg", "images/23.png", "masks/24.png"):
        picture(tmp_path / "train" / name)
    assert whats_wrong(tmp_path, MASKS, **SETTINGS) == [
        "train/images/1.png: 1.jpg has the same name; expected one file for each image",
        "train/masks/24.png: segmentation of no image; nearest: 23",
        "train/depths: No such file or directory",
    ]
    (tmp_path / "train/depths").mkdir()
    (tmp_path / "train/images/1.jpg").unlink()
    (tmp_path / "train/masks/24.png").unlink()
    suffixes = (
        "expected files that end in .png, .jpg, .jpeg, .webp, .bmp, .tif, .tiff, .gif, .ppm, .pgm, .npy, got none"
    )
    assert whats_wrong(tmp_path, MASKS, **SETTINGS) == [f"train/masks: {suffixes}", f"train/depths: {suffixes}"]


def test_links_out_of_the_folder_are_refused_unless_allowed(tmp_path: Path) -> None:
    picture(tmp_path / "other/1.png")
    (tmp_path / "train/cat").mkdir(parents=True)
    (tmp_path / "train/cat/1.png").symlink_to(tmp_path / "other/1.png")
    with pytest.raises(DataError, match=r"cat/1\.png: leads out of .*train; data\.outside=true allows it"):
        folder(tmp_path)[0]
    assert folder(tmp_path, outside=True)[0]["image"].shape == (1, 3, 4)
    picture(tmp_path / "train/images/1.png")
    masks: dict[str, LabelKind] = {"mask": "mask"}
    assert whats_wrong(tmp_path, masks, images="images", masks={"mask": "../other"}) == [
        "../other leaves the folder; data.outside=true allows it"
    ]
    data = folder(tmp_path, masks, images="images", masks={"mask": "../other"}, outside=True)
    assert (data[0]["mask"] == 7).all()
