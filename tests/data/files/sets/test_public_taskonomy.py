"""`taskonomy`: both trees and both spellings of its folders, splits by building."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from public_trees import colours, normals, opened, put

from mtl.data import DataError

SIZE = (8, 8)
NOW = {
    "rgb": ("rgb", "rgb"),
    "segmentation": ("segment_semantic", "segmentsemantic"),
    "depth": ("depth_zbuffer", "depth_zbuffer"),
    "distance": ("depth_euclidean", "depth_euclidean"),
    "normals": ("normal", "normal"),
}
EARLIER = NOW | {
    "segmentation": ("segmentsemantic", "segmentsemantic"),
    "depth": ("depth", "depth"),
    "distance": ("mist", "mist"),
}


def taskonomy(root: Path, folders: dict[str, tuple[str, str]] = NOW, component: str = "taskonomy/") -> Path:
    # Old Macintosh line ends, as in the published tables.
    put(
        root / "splits_taskonomy/train_val_test_tiny.csv",
        "id,train,val,test\rhanson,1,0,0\rmerom,1,0,0\rdarden,0,1,0\rihlen,0,0,1\rmcdade,0,0,1\r",
    )
    for building, views in (("hanson", [(1, 0), (10, 2)]), ("merom", [(0, 3)]), ("darden", [(5, 5)])):
        for point, view in views:
            depth = np.full(SIZE, 512 * (point + 1), np.uint16)
            depth[0, :2] = 65535, 256
            vectors = np.round(normals(*SIZE, seed=point) * 127 + 127).astype(np.uint8)
            vectors[0, 0] = 127
            mask = (np.arange(64).reshape(SIZE) % 18).astype(np.uint8)
            pixels = {"rgb": colours(*SIZE, point), "segmentation": mask, "depth": depth, "normals": vectors}
            for name, content in (pixels | {"distance": depth}).items():
                folder, domain = folders[name]
                file = f"{folder}/{component}{building}/point_{point}_view_{view}_domain_{domain}.png"
                put(root / file, content)
    return root


@pytest.mark.parametrize(("folders", "component"), [(NOW, "taskonomy/"), (NOW, ""), (EARLIER, "")])
def test_a_view_is_read_from_any_tree(tmp_path: Path, folders: dict[str, tuple[str, str]], component: str) -> None:
    data = opened("taskonomy", taskonomy(tmp_path, folders, component), "train")
    assert len(data) == 3
    places = [data.where(index).rpartition("/")[2] for index in range(3)]
    assert places == [f"point_{p}_view_{v}_domain_rgb.png" for p, v in ((10, 2), (1, 0), (0, 3))]
    item = data[1]
    assert torch.equal(item["image"], torch.from_numpy(colours(*SIZE, 1)).permute(2, 0, 1))
    assert item["segmentation"].flatten().tolist() == [(place % 18 - 1) % 256 for place in range(64)]
    for name in ("depth", "distance"):
        assert item[name].shape == (1, *SIZE)
        assert item[name].flatten().tolist() == [0.0, 0.5, *[2.0] * 62]
    vectors = torch.from_numpy(normals(*SIZE, seed=1)).permute(2, 0, 1)
    vectors[:, 0, 0] = 0
    assert torch.allclose(item["normals"], vectors, atol=0.02)
    assert torch.equal(item["normals"][:, 0, 0], torch.zeros(3))


def test_splits_share_no_building(tmp_path: Path) -> None:
    taskonomy(tmp_path)
    assert len(opened("taskonomy", tmp_path, "val")) == 1
    with pytest.raises(DataError, match=r"rgb/taskonomy: no building of the split 'test' in splits_taskonomy/train"):
        opened("taskonomy", tmp_path, "test")


def test_a_view_that_lacks_a_label_is_named(tmp_path: Path) -> None:
    file = taskonomy(tmp_path) / "normal/taskonomy/hanson/point_10_view_2_domain_normal.png"
    file.rename(file.with_name("point_11_view_2_domain_normal.png"))
    with pytest.raises(DataError, match=r"normal/taskonomy/hanson: expected the names .*hanson has no point_10_view_2"):
        opened("taskonomy", tmp_path, "train")
    file.with_name("point_11_view_2_domain_normal.png").rename(file.with_name("point_10_view_2_domain_rgb.png"))
    with pytest.raises(DataError, match=r"hanson/.*\.png: expected a name that ends in _domain_(rgb|normal)\.png"):
        opened("taskonomy", tmp_path, "train")
    assert len(opened("taskonomy", tmp_path, "train", {"depth": "depth"})) == 3


def test_a_table_of_buildings_without_the_columns_is_refused(tmp_path: Path) -> None:
    taskonomy(tmp_path)
    for text in ("", "building,split\nhanson,train\n", "id,train,val,test\nhanson,1\n"):
        put(tmp_path / "splits_taskonomy/train_val_test_tiny.csv", text)
        with pytest.raises(DataError, match=r"tiny\.csv: expected a table with the columns id,train,val,test"):
            opened("taskonomy", tmp_path, "train")
    with pytest.raises(DataError, match=r"mine\.csv: no such list; expected layout"):
        opened("taskonomy", tmp_path, "train", buildings="mine.csv")
