"""`nyuv2_mtan` and `cityscapes_mtan`: arrays are read by MTAN's conventions, and what is missing is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from public_trees import normals, opened, put

from mtl.data import DataError

SIZE = (6, 8)


def nyu(root: Path, num_train: int = 12, num_val: int = 3) -> Path:
    for split, num in (("train", num_train), ("val", num_val)):
        for i in range(num):
            rng = np.random.default_rng(i)
            put(root / f"{split}/image/{i}.npy", rng.random((*SIZE, 3)))
            put(root / f"{split}/label/{i}.npy", rng.integers(-1, 13, SIZE).astype(np.float32))
            depth = rng.uniform(0.7, 10, (*SIZE, 1)).astype(np.float32)
            depth[0, 0] = 0
            put(root / f"{split}/depth/{i}.npy", depth)
            vectors = normals(*SIZE, seed=i)
            vectors[0, 0] = 0
            put(root / f"{split}/normal/{i}.npy", vectors)
    return root


def cityscapes(root: Path, label: str, num: int = 3) -> Path:
    for split in ("train", "val"):
        for i in range(num):
            put(root / f"{split}/image/{i}.npy", np.full((*SIZE, 3), i / 10, np.float32))
            put(root / f"{split}/{label}/{i}.npy", np.full(SIZE, i - 1, np.int64))
            put(root / f"{split}/depth/{i}.npy", np.full((*SIZE, 1), i / 100))
    return root


def test_an_item_of_nyu_is_read_as_it_is_stored(tmp_path: Path) -> None:
    data = opened("nyuv2_mtan", nyu(tmp_path), "train")
    assert len(data) == 12
    assert data.labels == ("segmentation", "depth", "normals")
    for index in (0, 10):  # the tenth is 10.npy, not what comes after 1.npy
        item, rng = data[index], np.random.default_rng(index)
        pixels, mask = rng.random((*SIZE, 3)), rng.integers(-1, 13, SIZE)
        assert torch.allclose(item["image"], torch.from_numpy(pixels).permute(2, 0, 1).float() * 255)
        assert item["image"].dtype == torch.float32
        assert torch.equal(item["segmentation"], torch.from_numpy(np.where(mask < 0, 255, mask)).to(torch.uint8))
        depth = rng.uniform(0.7, 10, (*SIZE, 1)).astype(np.float32)
        depth[0, 0] = 0
        assert torch.equal(item["depth"], torch.from_numpy(depth).permute(2, 0, 1))
        vectors = torch.from_numpy(normals(*SIZE, seed=index)).permute(2, 0, 1)
        vectors[:, 0, 0] = 0
        assert torch.allclose(item["normals"], vectors, atol=1e-6)
        assert torch.equal(item["normals"][:, 0, 0], torch.zeros(3))


def test_a_part_of_an_item_is_read_alone(tmp_path: Path) -> None:
    data = opened("nyuv2_mtan", nyu(tmp_path), "val")
    assert len(data) == 3
    assert data.read(1, ["depth"]).keys() == {"depth"}
    assert data.read(1, []) == {}
    assert data.where(1) == str(tmp_path / "val/image/1.npy")
    assert {name: file.relative_to(tmp_path).as_posix() for name, file in data.files(1).items()} == {
        "image": "val/image/1.npy",
        "segmentation": "val/label/1.npy",
        "depth": "val/depth/1.npy",
        "normals": "val/normal/1.npy",
    }
    assert data.column("depth") is None


def test_the_13_classes_have_names(tmp_path: Path) -> None:
    names = opened("nyuv2_mtan", nyu(tmp_path), "val").classes["segmentation"]
    assert len(names) == len(set(names)) == 13
    assert (names[0], names[12]) == ("bed", "window")


def test_labels_that_no_task_wants_need_not_be_there(tmp_path: Path) -> None:
    for file in (nyu(tmp_path) / "train/normal").iterdir():
        file.unlink()
    (tmp_path / "train/normal").rmdir()
    data = opened("nyuv2_mtan", tmp_path, "train", {"depth": "depth"})
    assert data.files(0).keys() == {"image", "depth"}
    assert data.read(0, ["image", "depth"]).keys() == {"image", "depth"}
    with pytest.raises(DataError, match=r"train/normal: no such folder; expected layout: \{train,val\}/\{image,label,"):
        opened("nyuv2_mtan", tmp_path, "train")


def test_a_modality_that_lacks_a_file_is_named_when_the_set_is_opened(tmp_path: Path) -> None:
    (nyu(tmp_path) / "train/depth/7.npy").unlink()
    message = r"train/depth: expected the names of the 12 files of train/image, got 11; train/depth has no 7"
    with pytest.raises(DataError, match=message):
        opened("nyuv2_mtan", tmp_path, "train")
    (tmp_path / "train/image/7.npy").unlink()
    message = r"train/label: expected the names of the 11 files of train/image, got 12; train/image has no 7"
    with pytest.raises(DataError, match=message):
        opened("nyuv2_mtan", tmp_path, "train")
    assert len(opened("nyuv2_mtan", tmp_path, "train", {"depth": "depth"})) == 11


def test_a_folder_of_another_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such folder; expected layout"):
        opened("nyuv2_mtan", tmp_path / "nowhere", "train")
    with pytest.raises(DataError, match="train/image: no such folder; expected layout"):
        opened("nyuv2_mtan", tmp_path, "train")
    put(tmp_path / "train/images/0.npy", np.zeros(1))
    with pytest.raises(DataError, match="train/image: no such folder; nearest: images; expected layout"):
        opened("nyuv2_mtan", tmp_path, "train")
    put(tmp_path / "train/image/0.png", np.zeros((2, 2), np.uint8))
    with pytest.raises(DataError, match=r"train/image: no file ends in \.npy; it holds 0\.png; expected layout"):
        opened("nyuv2_mtan", tmp_path, "train")


def test_a_split_label_or_kind_that_the_set_has_not_is_refused(tmp_path: Path) -> None:
    nyu(tmp_path)
    with pytest.raises(DataError, match="nyuv2_mtan has no split 'test'; it has train, val"):
        opened("nyuv2_mtan", tmp_path, "test")
    with pytest.raises(DataError, match="no label 'normal'; it has segmentation, depth, normals; nearest: normals"):
        opened("nyuv2_mtan", tmp_path, "train", {"normal": "normals"})
    with pytest.raises(DataError, match="nyuv2_mtan: expected a task that learns depth from 'depth', got mask"):
        opened("nyuv2_mtan", tmp_path, "train", {"depth": "mask"})


def test_images_from_0_to_255_as_floats_are_refused_with_a_hint(tmp_path: Path) -> None:
    put(nyu(tmp_path) / "val/image/0.npy", np.full((*SIZE, 3), 128.0))
    with pytest.raises(
        DataError, match=r"val/image/0\.npy: expected floats from 0 to 1, got 128 to 128; store 0 to 255"
    ):
        opened("nyuv2_mtan", tmp_path, "val")[0]


def test_numbers_that_are_no_classes_are_refused(tmp_path: Path) -> None:
    put(nyu(tmp_path) / "val/label/0.npy", np.full(SIZE, -2))
    with pytest.raises(DataError, match=r"val/label/0\.npy: expected class numbers, -1 for none, got -2 to -2"):
        opened("nyuv2_mtan", tmp_path, "val")[0]


@pytest.mark.parametrize(("folder", "num_classes"), [("label_7", 7), ("label", 7), ("label_2", 2), ("label_19", 19)])
def test_an_item_of_cityscapes_is_read_from_any_of_its_label_folders(
    tmp_path: Path, folder: str, num_classes: int
) -> None:
    data = opened("cityscapes_mtan", cityscapes(tmp_path, folder), "train", num_classes=num_classes)
    assert len(data) == 3
    assert data.labels == ("segmentation", "depth")
    assert [int(data[i]["segmentation"][0, 0]) for i in range(3)] == [255, 0, 1]
    assert [float(data[i]["depth"][0, 0, 0]) for i in range(3)] == pytest.approx([0, 0.01, 0.02])
    assert data.files(2)["segmentation"] == (tmp_path / f"train/{folder}/2.npy").resolve()


def test_a_segmentation_that_is_not_there_is_named(tmp_path: Path) -> None:
    cityscapes(tmp_path, "label")
    with pytest.raises(DataError, match=r"train/label_19: no such folder; nearest: label; expected layout"):
        opened("cityscapes_mtan", tmp_path, "train", num_classes=19)


def test_links_out_of_the_folder_are_followed_only_if_allowed(tmp_path: Path) -> None:
    nyu(tmp_path / "elsewhere")
    root = tmp_path / "root"
    root.mkdir()
    (root / "train").symlink_to(tmp_path / "elsewhere/train")
    with pytest.raises(DataError, match="train/image: leads out of"):
        opened("nyuv2_mtan", root, "train")
    data = opened("nyuv2_mtan", root, "train", follow_links=True)
    assert data[0].keys() == {"image", "segmentation", "depth", "normals"}
    (tmp_path / "elsewhere/val/image/0.npy").unlink()
    (tmp_path / "elsewhere/val/image/0.npy").symlink_to(put(tmp_path / "0.npy", np.zeros((*SIZE, 3))))
    with pytest.raises(DataError, match=r"val/image/0\.npy: leads out of"):
        opened("nyuv2_mtan", tmp_path / "elsewhere", "val")[0]
