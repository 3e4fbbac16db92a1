"""`celeba`, `office31`, `office_home` and `nyud_mt`: sets whose images are in lists."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from public_trees import colours, normals, opened, put

from mtl.data import DataError
from mtl.data.files.sets.celeba import ATTRIBUTES

# CelebA


def celeba(root: Path, parts: Sequence[int] = (0, 1, 0, 2, 0)) -> Path:
    rng = np.random.default_rng(0)
    names = [f"{number + 1:06d}.jpg" for number in range(len(parts))]
    rows = [f"{name} " + " ".join(f"{v:2d}" for v in rng.choice([-1, 1], 40)) for name in names]
    put(root / "Anno/list_attr_celeba.txt", "\n".join([str(len(parts)), " ".join(ATTRIBUTES) + " ", *rows, ""]))
    put(root / "Eval/list_eval_partition.txt", "".join(f"{n} {p}\n" for n, p in zip(names, parts, strict=True)))
    for number, name in enumerate(names):
        put(root / "Img/img_align_celeba" / name, colours(218, 178, number))
    return root


def test_a_face_has_40_attributes(tmp_path: Path) -> None:
    data = opened("celeba", celeba(tmp_path), "train", {"attributes": "tags"})
    rows = (tmp_path / "Anno/list_attr_celeba.txt").read_text().splitlines()[2:]
    assert len(data) == 3
    for index, row in enumerate((0, 2, 4)):
        item = data.read(index, ["image", "attributes"])
        assert item["attributes"] == [float(value == "1") for value in rows[row].split()[1:]]
        assert item["image"].shape == (3, 218, 178)
        assert item["image"].dtype == torch.uint8
        assert (item["image"].float() - torch.from_numpy(colours(218, 178, row)).permute(2, 0, 1)).abs().mean() < 3
    column = data.column("attributes")
    assert column is not None
    assert column.dtype == torch.float64
    assert column.tolist() == [data.read(index, ["attributes"])["attributes"] for index in range(3)]
    assert [data.classes["attributes"][n] for n in (0, 39)] == ["5_o_Clock_Shadow", "Young"]


def test_each_attribute_is_a_label_of_its_own(tmp_path: Path) -> None:
    data = opened("celeba", celeba(tmp_path), "train", {"Smiling": "class", "Male": "tags"})
    every = data.column("attributes")
    assert every is not None
    smiling, male = (every[:, ATTRIBUTES.index(name)] for name in ("Smiling", "Male"))
    assert torch.equal(data.column("Smiling"), smiling)
    assert torch.equal(data.column("Male"), male[:, None])
    item = data.read(1, ["Smiling", "Male"])
    assert item == {"Smiling": int(smiling[1]), "Male": [float(male[1])]}
    assert isinstance(item["Smiling"], int)
    assert data.files(1).keys() == {"image"}
    assert data.where(1) == str(tmp_path / "Img/img_align_celeba/000003.jpg")


def test_the_three_splits_share_no_face(tmp_path: Path) -> None:
    celeba(tmp_path)
    splits = [opened("celeba", tmp_path, split) for split in ("train", "val", "test")]
    assert [len(split) for split in splits] == [3, 1, 1]
    assert len({split.where(index) for split in splits for index in range(len(split))}) == 5


def test_lists_of_celeba_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    attributes = celeba(tmp_path) / "Anno/list_attr_celeba.txt"
    partition = tmp_path / "Eval/list_eval_partition.txt"
    text, parts = attributes.read_text(), partition.read_text()
    for wrong, message in [
        (text.replace("5\n", "6\n", 1), r"list_attr_celeba\.txt: expected 6 images, as its first line says, got 5"),
        (text.replace("Young", "Old"), "expected the number of images, then CelebA's 40 attributes, each in a line"),
        (text.replace(" 1", " 2", 1), "expected 000001.jpg and 40 times 1 or -1, got 000001.jpg"),
        (text.replace(" 1", "", 1), "expected 000001.jpg and 40 times 1 or -1, got 000001.jpg"),
    ]:
        put(attributes, wrong)
        with pytest.raises(DataError, match=message):
            opened("celeba", tmp_path, "train")
    put(attributes, text)
    for wrong, message in [
        (
            parts.replace("000002.jpg 1\n", ""),
            r"celeba\.txt: expected the 4 images of Eval/list_eval_partition\.txt, got",
        ),
        (parts.replace("000002.jpg", "00002.jpg"), r"expected 00002\.jpg and 40 times 1 or -1, got 000002\.jpg"),
        (parts.replace("000002.jpg 1", "000002.jpg 3"), r"expected a name and 0 \(train\), 1 \(val\) or 2 \(test\)"),
        (parts.replace("000002.jpg 1", "000002.jpg"), r"expected a name and 0 \(train\), 1 \(val\) or 2 \(test\)"),
    ]:
        put(partition, wrong)
        with pytest.raises(DataError, match=message):
            opened("celeba", tmp_path, "train")


def test_a_face_that_is_missing_is_named_when_the_set_is_opened(tmp_path: Path) -> None:
    for number in (1, 3):
        (celeba(tmp_path) / f"Img/img_align_celeba/00000{number}.jpg").unlink()
    (tmp_path / "Img/img_align_celeba/000001.jpg").unlink()
    with pytest.raises(
        DataError, match=r"img_align_celeba/000001\.jpg: no such file, and 1 more file; expected layout"
    ):
        opened("celeba", tmp_path, "train")
    assert len(opened("celeba", tmp_path, "val")) == 1
    (tmp_path / "Eval/list_eval_partition.txt").unlink()
    with pytest.raises(DataError, match=r"Eval/list_eval_partition\.txt: no such list; expected layout: Img/"):
        opened("celeba", tmp_path, "train")


# Office


def office(root: Path, domains: Sequence[str], folder: str, num_classes: int) -> Path:
    """Two images of every class in each domain's training list, one in the others."""
    for place, domain in enumerate(domains):
        for split, num in (("train", 2), ("val", 1), ("test", 1)):
            lines = []
            for number in range(num_classes):
                for each in range(num):
                    file = f"{domain}/{folder}class_{number:02d}/{split}{each}.jpg"
                    put(root / file, colours(8, 9, number + 100 * place))
                    lines.append(f"{file} {number}\n")
            put(root / f"lists/{domain}_{split}.txt", "".join(lines))
    return root


@pytest.mark.parametrize(
    ("name", "domains", "folder", "num_classes"),
    [
        ("office31", ("amazon", "dslr", "webcam"), "images/", 31),
        ("office_home", ("Art", "Clipart", "Product", "Real_World"), "", 65),
    ],
)
def test_each_image_of_office_has_the_label_of_its_domain(
    tmp_path: Path, name: str, domains: Sequence[str], folder: str, num_classes: int
) -> None:
    data = opened(name, office(tmp_path, domains, folder, num_classes), "train")
    assert data.labels == tuple(domains)
    assert len(data) == len(domains) * 2 * num_classes
    for index in (0, 1, 2, len(data) - 1):
        item = data[index]
        domain = domains[index // (2 * num_classes)]
        assert item.keys() == {"image", domain}
        assert item[domain] == index // 2 % num_classes
        assert item["image"].shape == (3, 8, 9)
    for place, domain in enumerate(domains):
        column = data.column(domain)
        assert column is not None
        own = slice(2 * num_classes * place, 2 * num_classes * (place + 1))
        assert column[own].tolist() == [number // 2 for number in range(2 * num_classes)]
        assert int(column.isnan().sum()) == (len(domains) - 1) * 2 * num_classes
        assert data.classes[domain][3] == "class_03"
    assert len(opened(name, tmp_path, "test")) == len(domains) * num_classes


def test_only_the_domains_that_tasks_want_are_read(tmp_path: Path) -> None:
    office(tmp_path, ["dslr"], "images/", 31)
    data = opened("office31", tmp_path, "val", {"dslr": "class"})
    assert len(data) == 31
    assert math.isfinite(float(data.column("dslr").sum()))  # type: ignore[union-attr]
    with pytest.raises(
        DataError, match=r"lists/amazon_val\.txt: no such list; nearest: .*; expected layout: \{amazon,"
    ):
        opened("office31", tmp_path, "val")


def test_lists_of_office_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    office(tmp_path, ["dslr"], "images/", 31)
    file = tmp_path / "lists/dslr_train.txt"
    text = file.read_text()
    for wrong, message in [
        (
            text.replace("train0.jpg 30", "train0.jpg 31"),
            r"dslr_train\.txt: line 61: expected a file and a class from 0 to 30",
        ),
        (text.replace("train0.jpg 0\n", "train0.jpg\n"), "line 1: expected a file and a class from 0 to 30, got dslr/"),
        (text.replace("train0.jpg 5\n", "train0.jpg 6\n"), "class 6 for images in the folders class_05 and class_06"),
        (text.replace("class_00/train0.jpg", "class_00/other.jpg"), r"class_00/other\.jpg: no such file; expected"),
        (text.replace("dslr/images/class_00/train0.jpg", "../x/y.jpg"), r"\.\./x: leads out of"),
        ("\n", "got an empty list"),
    ]:
        put(file, wrong)
        with pytest.raises(DataError, match=message):
            opened("office31", tmp_path, "train", {"dslr": "class"})


def test_the_lists_may_be_in_another_folder_of_the_root(tmp_path: Path) -> None:
    office(tmp_path, ["dslr"], "images/", 31)
    (tmp_path / "lists").rename(tmp_path / "office-31")
    assert len(opened("office31", tmp_path, "val", {"dslr": "class"}, lists="office-31")) == 31
    with pytest.raises(DataError, match="leads out of"):
        opened("office31", tmp_path / "dslr", "val", {"dslr": "class"}, lists="../office-31")


# NYUD-MT

NYUD = (12, 16)


def nyud(root: Path, with_pngs: bool) -> Path:
    for split, names in (("train", ("0001", "0003", "0004")), ("val", ("0002",))):
        put(root / f"gt_sets/{split}.txt", "\n".join(names) + "\n")
        for name in names:
            seed = int(name)
            mask = np.random.default_rng(seed).integers(0, 41, NYUD).astype(np.uint8)
            vectors, edge = normals(*NYUD, seed=seed), np.zeros(NYUD, np.uint8)
            vectors[0, 0], edge[2] = 0, 1
            put(root / f"images/{name}.{'png' if with_pngs else 'jpg'}", colours(*NYUD, seed))
            put(root / f"segmentation/{name}.png", mask)
            put(root / f"depth/{name}.npy", np.full(NYUD, seed / 2, np.float32))
            if with_pngs:
                put(root / f"edge/{name}.png", edge * 255)
                put(root / f"normals/{name}.png", np.round((vectors + 1) / 2 * 255).astype(np.uint8))
            else:
                put(root / f"edge/{name}.npy", edge.astype(np.float32))
                put(root / f"normals/{name}.npy", vectors)
    return root


@pytest.mark.parametrize("with_pngs", [False, True])
def test_both_trees_of_nyud_give_the_same_labels(tmp_path: Path, with_pngs: bool) -> None:
    data = opened("nyud_mt", nyud(tmp_path, with_pngs), "train")
    assert len(data) == 3
    for index, seed in enumerate((1, 3, 4)):
        item = data[index]
        assert (item["image"].float() - torch.from_numpy(colours(*NYUD, seed)).permute(2, 0, 1)).abs().mean() < 3
        stored = np.random.default_rng(seed).integers(0, 41, NYUD)
        assert torch.equal(item["segmentation"], torch.from_numpy(np.where(stored == 0, 255, stored - 1)).byte())
        assert torch.equal(item["depth"], torch.full((1, *NYUD), seed / 2))
        vectors = torch.from_numpy(normals(*NYUD, seed=seed)).permute(2, 0, 1)
        vectors[:, 0, 0] = 0
        assert torch.allclose(item["normals"], vectors, atol=0.01)
        assert torch.equal(item["normals"][:, 0, 0], torch.zeros(3))
        expected = torch.zeros(NYUD, dtype=torch.uint8)
        expected[2] = 1
        assert torch.equal(item["edges"], expected)
    assert (data.classes["segmentation"][0], data.classes["segmentation"][39]) == ("wall", "other prop")


def test_a_label_of_nyud_that_is_missing_is_named(tmp_path: Path) -> None:
    (nyud(tmp_path, with_pngs=True) / "normals/0003.png").unlink()
    with pytest.raises(
        DataError, match=r"normals/0003\.png: no such file; expected layout: gt_sets/\{train,val\}\.txt"
    ):
        opened("nyud_mt", tmp_path, "train")
    assert len(opened("nyud_mt", tmp_path, "train", {"depth": "depth"})) == 3
    put(tmp_path / "segmentation/0001.png", np.full(NYUD, 41, np.uint8))
    with pytest.raises(DataError, match=r"segmentation/0001\.png: expected the numbers 0, 1, 2, .*, 40, got 41"):
        opened("nyud_mt", tmp_path, "train", {"segmentation": "mask"})[0]
    put(tmp_path / "gt_sets/train.txt", "\n")
    with pytest.raises(DataError, match=r"gt_sets/train\.txt: expected names of images, got none"):
        opened("nyud_mt", tmp_path, "train")


def test_a_list_that_is_no_text_is_refused(tmp_path: Path) -> None:
    picture = Image.fromarray(colours(4, 4))
    (nyud(tmp_path, with_pngs=False) / "gt_sets/train.txt").unlink()
    picture.save(tmp_path / "gt_sets/train.txt", format="png")
    with pytest.raises(DataError, match=r"gt_sets/train\.txt: .*codec can't decode"):
        opened("nyud_mt", tmp_path, "train")
