"""COCO's annotations: masks against ones made by hand, tags, and what is said of each mistake."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from mtl.config import SettingError
from mtl.config.file_data import CocoData, SplitName
from mtl.data.cache import DataError
from mtl.data.files.coco import Coco
from mtl.data.files.coco_masks import decode_counts, polygon_mask, run_length_mask
from mtl.tasks.base import LabelKind
from tables import picture

KINDS: Mapping[str, LabelKind] = {"segmentation": "mask", "tags": "tags"}
CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]
IMAGE = {"id": 1, "file_name": "a.png", "height": 3, "width": 4}
ALL = [0, 0, 4, 0, 4, 3, 0, 3]


def encode(counts: list[int]) -> str:
    """Run lengths in COCO's compressed form, by its description (maskApi.c, rleToString)."""
    text = ""
    for place, count in enumerate(counts):
        number = count - counts[place - 2] if place > 2 else count
        more = True
        while more:
            bits = number & 31
            number >>= 5
            more = number != -1 if bits & 16 else number != 0
            text += chr(48 + bits + 32 * more)
    return text


def coco(
    folder: Path,
    annotations: list[dict[str, Any]],
    kinds: Mapping[str, LabelKind] = KINDS,
    which: SplitName = "train",
    images: Any = (IMAGE,),
    val: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Coco:
    content = {"images": list(images), "annotations": annotations, "categories": CATEGORIES}
    for name, each in {"train": content, "val": content | (val or {})}.items():
        (folder / f"{name}.json").write_text(json.dumps(each))
    places = {name: str(folder / f"{name}.json") for name in ("train", "val")}
    data = {"name": "coco", **places, "images": str(folder / "images")} | settings
    return Coco(CocoData.model_validate(data), which, kinds)


def whats_wrong(folder: Path, *arguments: Any, **more: Any) -> list[str]:
    with pytest.raises(DataError) as error:
        coco(folder, *arguments, **more)
    return str(error.value).replace(f"{folder}/", "").splitlines()


def mask_of(*rows: str) -> np.ndarray[Any, Any]:
    return np.array([[int(pixel) for pixel in row] for row in rows])


# Masks


@pytest.mark.parametrize(
    ("corners", "rows"),
    [
        ([(0, 0), (4, 0), (4, 3), (0, 3)], ("1111", "1111", "1111")),
        ([(1, 1), (3, 1), (3, 2), (1, 2)], ("0000", "0110", "0000")),
        ([(0.5, 0.5), (2.5, 0.5), (2.5, 1.5), (0.5, 1.5)], ("1100", "0000", "0000")),
        ([(0.6, 0), (2.4, 0), (2.4, 3), (0.6, 3)], ("0100", "0100", "0100")),
        ([(0, 0), (4, 0), (0, 3)], ("1110", "1100", "1000")),
        ([(-9, -9), (9, -9), (9, 1), (-9, 1)], ("1111", "0000", "0000")),
        ([(9, 9), (10, 9), (10, 10)], ("0000", "0000", "0000")),
    ],
)
def test_a_polygon_holds_the_pixels_whose_centres_are_in_it(corners: list[tuple[float, float]], rows: Any) -> None:
    for points in (corners, corners[::-1], corners[1:] + corners[:1]):
        np.testing.assert_array_equal(polygon_mask(np.array(points, np.float32), (3, 4)), mask_of(*rows))


@given(st.lists(st.tuples(st.floats(-3, 12, width=32), st.floats(-3, 9, width=32)), min_size=3, max_size=3))
def test_a_triangle_lies_on_one_side_of_its_three_edges(corners: list[tuple[float, float]]) -> None:
    points = np.array(corners, np.float64)
    edges = np.roll(points, -1, axis=0) - points
    turn = edges[0, 0] * edges[1, 1] - edges[0, 1] * edges[1, 0]
    assume(abs(turn) > 1e-3)
    rows, columns = np.mgrid[0:7, 0:9] + 0.5
    # The distance of each centre from each edge, positive inside.
    distances = np.stack(
        [
            np.sign(turn) * (edge[0] * (rows - start[1]) - edge[1] * (columns - start[0])) / np.hypot(*edge)
            for start, edge in zip(points, edges, strict=True)
        ]
    ).min(axis=0)
    certain = abs(distances) > 1e-4
    np.testing.assert_array_equal(polygon_mask(points.astype(np.float32), (7, 9))[certain], distances[certain] > 0)


def test_run_lengths_go_down_the_columns() -> None:
    np.testing.assert_array_equal(run_length_mask([1, 3, 5, 2, 1], (3, 4)), mask_of("0101", "1001", "1000"))
    with pytest.raises(ValueError, match="add up to 3 x 4 pixels, got 11"):
        run_length_mask([1, 10], (3, 4))
    with pytest.raises(ValueError, match="add up"):
        run_length_mask([-1, 13], (3, 4))


def test_compressed_run_lengths_are_those_written_by_hand() -> None:
    # 1, 3, 5 as they are; then 2 - 3 = -1 is 11111, 1 - 5 = -4 is 11100.
    assert decode_counts("135OL") == [1, 3, 5, 2, 1]
    # 100 = 3 * 32 + 4: the lowest five bits first, with the mark that more follow.
    assert decode_counts("T3") == [100]
    assert decode_counts("`0") == [16]  # 16 alone would be -16


def test_compressed_run_lengths_are_those_that_pycocotools_writes() -> None:
    counts = decode_counts("61X13mN000`0")
    assert counts == [6, 1, 40, 4, 5, 4, 5, 4, 21] and run_length_mask(counts, (9, 10)).sum() == 13


@given(st.lists(st.integers(0, 10**6)))
def test_compressed_run_lengths_are_read_as_they_are_written(counts: list[int]) -> None:
    assert decode_counts(encode(counts)) == counts


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=6))
def test_a_mask_survives_its_run_lengths(rows: list[list[bool]]) -> None:
    mask = np.array(rows)
    counts, value = [0], False
    for pixel in mask.T.ravel():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    np.testing.assert_array_equal(run_length_mask(decode_counts(encode(counts)), mask.shape), mask)


@pytest.mark.parametrize("text", ["\u00e9", "1 ", "T"])
def test_other_text_is_no_run_length(text: str) -> None:
    with pytest.raises(ValueError, match="in COCO's compressed form"):
        decode_counts(text)


# The data set


def test_masks_and_tags_are_read(tmp_path: Path) -> None:
    picture(tmp_path / "images/a.png")
    annotations = [
        {"image_id": 1, "category_id": 3, "segmentation": [[1, 0, 2, 0, 2, 3, 1, 3], [3, 0, 4, 0, 4, 1, 3, 1]]},
        {"image_id": 1, "category_id": 7, "segmentation": [ALL]},  # larger, so below
        {"image_id": 1, "category_id": 7, "segmentation": {"size": [3, 4], "counts": [11, 1]}},
        {
            "image_id": 1,
            "category_id": 3,
            "segmentation": {"size": [3, 4], "counts": encode([11, 1])},
        },  # later, so above
    ]
    images = [IMAGE, {"id": "x", "file_name": "b.png", "height": 3, "width": 4}]
    data = coco(tmp_path, annotations, images=images)
    assert len(data) == 2
    assert data.classes == {"segmentation": ("background", "cat", "dog"), "tags": ("cat", "dog")}
    item = data[0]
    assert item["image"].shape == (1, 3, 4)
    np.testing.assert_array_equal(item["segmentation"].numpy(), mask_of("2121", "2122", "2121"))
    assert item["segmentation"].dtype == torch.uint8
    assert item["tags"].tolist() == [1, 1] and item["tags"].dtype == torch.float32
    other = data.read(1, ["segmentation", "tags"])
    assert other["tags"].tolist() == [0, 0] and not other["segmentation"].any()
    column = data.column("tags")
    assert column is not None and column.tolist() == [[1, 1], [0, 0]] and data.column("segmentation") is None
    assert data.where(1) == f"{tmp_path}/train.json, b.png"


def test_tags_need_no_outlines(tmp_path: Path) -> None:
    data = coco(tmp_path, [{"image_id": 1, "category_id": 7, "bbox": [0, 0, 1, 1]}], {"tags": "tags"})
    assert data.read(0, ["tags"])["tags"].tolist() == [0, 1]


def test_each_split_may_have_a_folder_of_images(tmp_path: Path) -> None:
    picture(tmp_path / "v/a.png", 9)
    folders = {"train": str(tmp_path / "t"), "val": str(tmp_path / "v")}
    content = {"images": [IMAGE], "annotations": [], "categories": CATEGORIES}
    (tmp_path / "a.json").write_text(json.dumps(content))
    place = str(tmp_path / "a.json")
    settings = CocoData.model_validate({"name": "coco", "train": place, "val": place, "images": folders})
    assert (Coco(settings, "val", KINDS)[0]["image"] == 9).all()
    with pytest.raises(DataError, match=r"a\.json, a\.png: image: .*/t/a\.png: No such file or directory"):
        Coco(settings, "train", KINDS).read(0, ["image"])


@pytest.mark.parametrize(
    ("annotation", "line"),
    [
        ({}, "expected a key 'image_id', got nothing"),
        ({"image_id": 2}, "expected the id of an image as image_id, got 2"),
        ({"image_id": 1, "category_id": 4}, "no category of training has the id 4"),
        ({"image_id": 1, "category_id": 3}, "expected a key 'segmentation', got image_id, category_id"),
        ({"segmentation": []}, "expected a segmentation of polygons, each of three points or more as x, y, x, y, ..."),
        ({"segmentation": [[1, 2, 3, 4]]}, "expected a segmentation of polygons"),
        ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "expected a segmentation of polygons"),
        ({"segmentation": [[1, 2, 3, 4, 5, "x"]]}, "could not convert"),
        ({"segmentation": [[1, 2, 3, 4, 5, 1e300]]}, "expected a segmentation of polygons"),
        ({"segmentation": {"counts": [math.inf], "size": [3, 4]}}, "cannot convert float infinity"),
        ({"segmentation": None}, "'NoneType' object is not iterable"),
        ({"segmentation": {"counts": [12]}}, "expected a key 'size', got image_id, category_id, segmentation"),
    ],
)
def test_an_annotation_that_is_none_is_reported(tmp_path: Path, annotation: dict[str, Any], line: str) -> None:
    if "segmentation" in annotation:
        annotation = {"image_id": 1, "category_id": 3} | annotation
    (found,) = whats_wrong(tmp_path, [annotation])
    assert found.startswith(f"train.json, annotation 0: {line}")


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    images = [IMAGE, IMAGE, {"id": 2}, IMAGE | {"id": 3, "file_name": "../a.png"}]
    assert whats_wrong(tmp_path, [{"image_id": 9}], images=images) == [
        f"train.json, image 1: expected an id of its own, file_name, height and width, got {str(IMAGE)[:80]}",
        "train.json, image 2: expected an id of its own, file_name, height and width, got {'id': 2}",
        "train.json: ../a.png leaves the folder; data.outside=true allows it",
        "train.json, annotation 0: expected the id of an image as image_id, got 9",
    ]


def test_run_lengths_of_another_size_are_reported_when_they_are_read(tmp_path: Path) -> None:
    for counts, size, line in (
        ([12], [4, 3], "expected run lengths of 3 x 4 pixels, got 4 x 3"),
        ([11], [3, 4], "expected run lengths that add up to 3 x 4 pixels, got 11"),
    ):
        annotation = {"image_id": 1, "category_id": 3, "segmentation": {"size": size, "counts": counts}}
        with pytest.raises(DataError, match=rf"train\.json, a\.png: segmentation: annotation 0: {line}$"):
            coco(tmp_path, [annotation]).read(0, ["segmentation"])


def test_files_and_labels_that_do_not_fit(tmp_path: Path) -> None:
    start = "COCO's annotations have masks as segmentation, and tags as tags, got"
    assert whats_wrong(tmp_path, [], {"tag": "tags", "segmentation": "depth"}) == [
        f"{start} 'tag' as tags; nearest: tags",
        f"{start} 'segmentation' as depth; nearest: segmentation",
    ]
    assert whats_wrong(tmp_path, [], images=[]) == ["train.json: expected at least one image, got none"]
    val = {"annotations": [{"image_id": 1, "category_id": 8, "segmentation": [ALL]}]}
    assert whats_wrong(tmp_path, [], which="val", val=val) == [
        "val.json, annotation 0: no category of training has the id 8"
    ]
    settings = CocoData(name="coco", train=str(tmp_path / "x.json"), val="y.json", images="i")
    for content, line in (
        ("[1]", "expected lists of images, annotations and categories, got no images"),
        ('{"images": [], "annotations": []}', "expected lists .*, got no categories"),
        ("{", "expected JSON, got an error: "),
        ("[" * 100_000, "expected JSON, got an error: "),
    ):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(DataError, match=rf"x\.json: {line}"):
            Coco(settings, "train", KINDS)
    with pytest.raises(DataError, match=r"^y\.json: No such file or directory$"):
        Coco(settings, "val", KINDS)
    with pytest.raises(SettingError, match=r"^data\.test: this split is required here$"):
        Coco(settings, "test", KINDS)
