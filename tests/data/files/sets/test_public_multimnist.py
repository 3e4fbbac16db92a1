"""`multimnist`: pairs of images in MNIST's format, composed as Sener & Koltun do."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from public_trees import opened

from mtl.data import DataError


def idx(file: Path, values: NDArray[np.uint8], magic: int) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    content = struct.pack(f">{1 + values.ndim}i", magic, *values.shape) + values.tobytes()
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    return file


def mnist(root: Path, suffix: str = "", num_train: int = 30, num_test: int = 8) -> Path:
    rng = np.random.default_rng(0)
    for stem, num in (("train", num_train), ("t10k", num_test)):
        idx(root / f"{stem}-images-idx3-ubyte{suffix}", rng.integers(0, 256, (num, 28, 28)).astype(np.uint8), 2051)
        idx(root / f"{stem}-labels-idx1-ubyte{suffix}", (np.arange(num) % 10).astype(np.uint8), 2049)
    return root


@pytest.mark.parametrize(("folder", "suffix"), [("", ""), ("", ".gz"), ("raw", "")])
def test_a_pair_is_two_images_and_the_brighter_one_where_they_overlap(tmp_path: Path, folder: str, suffix: str) -> None:
    mnist(tmp_path / folder, suffix)
    data = opened("multimnist", tmp_path, "train")
    pixels = np.random.default_rng(0).integers(0, 256, (30, 28, 28)).astype(np.uint8)
    assert len(data) == 25
    for index in (0, 7, 24):
        left, right = (int(word) for word in data.where(index).rpartition("images ")[2].split(" and "))
        canvas = np.zeros((2, 36, 36), np.uint8)
        canvas[0, :28, :28], canvas[1, 8:, 8:] = pixels[left], pixels[right]
        item = data[index]
        assert torch.equal(item["image"], torch.from_numpy(canvas.max(axis=0))[None])
        assert (item["left"], item["right"]) == (left % 10, right % 10)
        for side, number in (("left", left), ("right", right)):
            column = data.column(side)
            assert column is not None
            assert int(column[index]) == number % 10
            assert len(column) == 25


def test_splits_share_no_image_and_pairs_are_the_same_every_time(tmp_path: Path) -> None:
    mnist(tmp_path)
    used = {}
    for split in ("train", "val", "test"):
        data, again = (opened("multimnist", tmp_path, split) for _ in range(2))
        pairs = [data.where(index) for index in range(len(data))]
        assert pairs == [again.where(index) for index in range(len(data))]
        used[split] = {int(word) for pair in pairs for word in pair.rpartition("images ")[2].split(" and ")}
        assert data.files(0).keys() == {"image"}
    assert used == {"train": set(range(25)), "val": set(range(25, 30)), "test": set(range(8))}
    assert "t10k" in opened("multimnist", tmp_path, "test").where(0)


def test_files_that_are_not_in_the_format_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte: no such file; expected layout: \[raw/\]"):
        opened("multimnist", tmp_path, "train")
    images = mnist(tmp_path) / "train-images-idx3-ubyte"
    whole = images.read_bytes()
    for wrong in (b"", whole[:10], b"\0\0\0\0" + whole[4:]):
        images.write_bytes(wrong)
        with pytest.raises(DataError, match="train-images-idx3-ubyte: expected a file in MNIST's format with 3 axes"):
            opened("multimnist", tmp_path, "train")
    images.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"expected 23,520 bytes after its header, got 23,519"):
        opened("multimnist", tmp_path, "train")[0]
    idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(29, np.uint8), 2049)
    with pytest.raises(DataError, match="expected 30 labels as there are images, got 29"):
        opened("multimnist", tmp_path, "train")
    mnist(tmp_path, num_train=5)
    with pytest.raises(DataError, match="expected at least 6 images, got 5"):
        opened("multimnist", tmp_path, "val")


def test_half_an_archive_is_refused(tmp_path: Path) -> None:
    images = mnist(tmp_path, ".gz") / "train-images-idx3-ubyte.gz"
    images.write_bytes(images.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz: "):
        opened("multimnist", tmp_path, "train")[0]
    images.write_text("no archive")
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz: Not a gzipped file"):
        opened("multimnist", tmp_path, "train")
