"""Data sets of Hugging Face's `datasets`: what the library writes is read as tasks take it, and mistakes are named."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import Array2D, Array3D, ClassLabel, Dataset, DatasetDict, Features, List, Value
from PIL import Image

from mtl.config import SettingError
from mtl.config.hub_data import HuggingFaceData
from mtl.data.cache import DataError
from mtl.data.files.hub import HubSet, open_hub
from mtl.data.files.problems import problems
from mtl.tasks.base import LabelKind
from tables import picture

KINDS: Mapping[str, LabelKind] = {"label": "class"}


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def pictures(num: int, mode: str = "RGB") -> list[Image.Image]:
    return [Image.new(mode, (4, 3), (n, 2 * n, 3 * n) if mode == "RGB" else n) for n in range(num)]


def saved(place: Path, columns: Mapping[str, Any], features: Mapping[str, Any] | None = None) -> Dataset:
    """Writes a data set of pictures and these columns, as one split without a name, unless its place has one."""
    num = len(next(iter(columns.values())))
    all_columns = {"image": pictures(num), **columns}
    own = None if features is None else Features({"image": datasets.Image(), **features})
    made = Dataset.from_dict(all_columns, features=own)
    made.save_to_disk(str(place))
    return made


def feature(place: Path, name: str, description: Mapping[str, Any]) -> None:
    """Writes another feature of a column than the library would let pass."""
    info = json.loads((place / "dataset_info.json").read_text())
    info["features"][name] = description
    (place / "dataset_info.json").write_text(json.dumps(info))


def opened(
    place: Path | str, kinds: Mapping[str, LabelKind] = KINDS, train: str = "train", **settings: Any
) -> dict[str, HubSet]:
    data = {"name": "huggingface", "path": str(place), "train": train} | settings
    if "val" not in data and "split" not in data:
        data["val"] = train
    return open_hub(HuggingFaceData.model_validate(data), kinds, ("train", "val"))


def whats_wrong(place: Path, kinds: Mapping[str, LabelKind] = KINDS, **settings: Any) -> list[str]:
    with pytest.raises(DataError) as error:
        opened(place, kinds, **settings)
    return str(error.value).replace(f"{place.parent}/", "").splitlines()


def column(data: HubSet, name: str) -> list[Any]:
    found = data.column(name)
    assert found is not None
    return [[None if v != v else v for v in row] if isinstance(row, list) else row for row in found.tolist()]


# What is read


def test_every_kind_of_label_is_read_as_its_task_takes_it(tmp_path: Path) -> None:
    normals = np.zeros((2, 3, 4, 3), np.float32)
    normals[..., 2] = -2
    saved(
        tmp_path / "a",
        {
            "kind": [1, 0],
            "species": ["lynx", "cat"],
            "traits": [[2, 0], []],
            "words": [["b", "a"], []],
            "flags": [[1, 0, None], [0, 0, 1]],
            "age": [1.5, 2.0],
            "size": [[1.0, -20.0], [3.0, None]],
            "mask": [Image.new("L", (4, 3), 5), None],
            "depth": [Image.fromarray(np.full((3, 4), 1500, np.uint16)), None],
            "far": [np.full((3, 4), 0.5, np.float32), np.zeros((3, 4), np.float32)],
            "normals": list(normals),
            "points": [[[1.0, 2.0, 2.0], [0.5, 0.0, 1.0]], [[0.0, 0.0, 0.0], [3.0, 1.0, 2.0]]],
        },
        {
            "kind": ClassLabel(names=["z", "y"]),
            "species": Value("string"),
            "traits": List(ClassLabel(names=["r", "q", "p"])),
            "words": List(Value("string")),
            "flags": List(Value("int8")),
            "age": Value("float32"),
            "size": List(Value("float64")),
            "mask": datasets.Image(),
            "depth": datasets.Image(),
            "far": Array2D((3, 4), "float32"),
            "normals": Array3D((3, 4, 3), "float32"),
            "points": Array2D((2, 3), "float32"),
        },
    )
    kinds: dict[str, LabelKind] = {
        "kind": "class",
        "species": "class",
        "traits": "tags",
        "words": "tags",
        "flags": "tags",
        "age": "numbers",
        "size": "numbers",
        "mask": "mask",
        "depth": "depth",
        "far": "depth",
        "normals": "normals",
        "points": "points",
    }
    data = opened(tmp_path / "a", kinds, scale={"depth": 0.001})["train"]
    first, second = data[0], data[1]
    assert {name: (value.dtype, tuple(value.shape)) for name, value in first.items()} == {
        "image": (torch.uint8, (3, 3, 4)),
        "kind": (torch.int64, ()),
        "species": (torch.int64, ()),
        "traits": (torch.float32, (3,)),
        "words": (torch.float32, (2,)),
        "flags": (torch.float32, (3,)),
        "age": (torch.float32, ()),
        "size": (torch.float32, (2,)),
        "mask": (torch.uint8, (3, 4)),
        "depth": (torch.float32, (1, 3, 4)),
        "far": (torch.float32, (1, 3, 4)),
        "normals": (torch.float32, (3, 3, 4)),
        "points": (torch.float32, (2, 3)),
    }
    assert second["image"][:, 0, 0].tolist() == [1, 2, 3]
    assert first["kind"] == 1 and first["species"] == 1 and first["age"] == 1.5
    assert first["traits"].tolist() == [1, 0, 1] and second["traits"].tolist() == [0, 0, 0]
    assert first["words"].tolist() == [1, 1] and second["words"].tolist() == [0, 0]
    assert column(data, "flags") == [[1, 0, None], [0, 0, 1]] and column(data, "size") == [[1, -20], [3, None]]
    assert (
        (first["mask"] == 5).all() and torch.allclose(first["depth"], torch.tensor(1.5)) and (first["far"] == 0.5).all()
    )
    assert first["normals"][:, 0, 0].tolist() == [0, 0, -1]
    assert first["points"].tolist() == [[1, 2, 2], [0.5, 0, 1]]
    assert "mask" not in second and "depth" not in second
    # Names of the data set keep their order; others are numbered by the alphabet.
    assert data.classes == {
        "kind": ("z", "y"),
        "species": ("cat", "lynx"),
        "traits": ("r", "q", "p"),
        "words": ("a", "b"),
        "flags": ("0", "1", "2"),
    }
    assert list(problems(data, kinds)) == []


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (np.full((3, 4), 9, np.uint8), (1, torch.uint8, 9.0)),
        (np.full((3, 4, 4), 9, np.uint8), (4, torch.uint8, 9.0)),
        (np.full((3, 4), 2570, np.uint16), (1, torch.float32, 10.0)),
    ],
)
def test_pictures_keep_their_channels_and_bits(tmp_path: Path, pixels: Any, expected: tuple[int, Any, float]) -> None:
    saved(tmp_path / "a", {"image": [Image.fromarray(pixels)] * 2, "label": [0, 1]})
    image = opened(tmp_path / "a")["train"][0]["image"]
    assert (len(image), image.dtype, float(image[0, 0, 0])) == expected


def test_arrays_and_bytes_are_images_too(tmp_path: Path) -> None:
    picture(tmp_path / "1.png", (1, 2, 3), mode="RGB")
    content = (tmp_path / "1.png").read_bytes()
    many = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
    columns = {"label": [0], "raw": [content], "cube": [many]}
    features = {"label": Value("int64"), "raw": Value("binary"), "cube": Array3D((3, 4, 5), "uint8")}
    saved(tmp_path / "a", columns, features)
    assert opened(tmp_path / "a", image="raw")["train"][0]["image"][:, 0, 0].tolist() == [1, 2, 3]
    cube = opened(tmp_path / "a", image="cube")["train"][0]["image"]
    assert np.array_equal(cube.permute(1, 2, 0).numpy(), many)


@pytest.mark.parametrize("missing", [None, -1])
def test_a_missing_class_is_no_label(tmp_path: Path, missing: int | None) -> None:
    saved(tmp_path / "a", {"label": [1, missing, 0]}, {"label": ClassLabel(names=["x", "y"])})
    data = opened(tmp_path / "a")["train"]
    assert "label" not in data[1] and data[2]["label"] == 0
    found = data.column("label")
    assert found is not None and math.isnan(found[1]) and found[[0, 2]].tolist() == [1, 0]


def two_splits(place: Path) -> None:
    one = Dataset.from_dict({"image": pictures(6), "label": [0, 1, 2, 0, 1, 2]})
    DatasetDict({"train": one, "validation": one.select([5, 4])}).save_to_disk(str(place))


def test_splits_have_names_slices_and_sums(tmp_path: Path) -> None:
    two_splits(tmp_path / "a")

    def rows(train: str) -> list[tuple[str, int]]:
        data = opened(tmp_path / "a", train=train)["train"]
        return [
            (data.where(n).removeprefix(f"{tmp_path}/a, "), int(data[n]["image"][0, 0, 0])) for n in range(len(data))
        ]

    assert rows("validation") == [("validation[0]", 5), ("validation[1]", 4)]
    assert rows("train[:50%]") == [("train[0]", 0), ("train[1]", 1), ("train[2]", 2)]
    assert rows("train[-2:]+validation[1:]") == [("train[4]", 4), ("train[5]", 5), ("validation[1]", 4)]


def test_a_column_divides_one_split(tmp_path: Path) -> None:
    part = ["val", "train", "train", "test", "train"]
    saved(tmp_path / "a", {"label": ["b", "a", "b", "a", "b"], "part": part})
    data = opened(tmp_path / "a", split={"by": "column", "column": "part"})
    assert [int(data["train"][n]["image"][0, 0, 0]) for n in range(3)] == [1, 2, 4]
    assert column(data["train"], "label") == [0, 1, 1] and column(data["val"], "label") == [1]
    assert data["val"].where(0) == f"{tmp_path}/a, train[0]"
    settings = HuggingFaceData.model_validate(
        {"name": "huggingface", "path": str(tmp_path / "a"), "split": {"by": "column", "column": "part"}}
    )
    assert len(open_hub(settings, KINDS, ["test"])["test"]) == 1


# Where it is


def test_parquet_files_and_folders_of_them_are_read(tmp_path: Path) -> None:
    made = Dataset.from_dict({"image": pictures(4), "label": [0, 1, 1, 0]})
    (tmp_path / "folder").mkdir()
    made.to_parquet(str(tmp_path / "a [1].parquet"))
    made.to_parquet(str(tmp_path / "folder/train-00000-of-00001.parquet"))
    made.select([2]).to_parquet(str(tmp_path / "folder/validation-00000-of-00001.parquet"))
    one = opened(tmp_path / "a [1].parquet", train="train[:3]", val="train[3:]")
    assert [len(data) for data in one.values()] == [3, 1]
    other = opened(tmp_path / "folder", val="validation")
    assert other["val"][0]["image"][0, 0, 0] == 2 and len(other["train"]) == 4


def image_folder(root: Path) -> None:
    for split in ("train", "validation"):
        for number, name in enumerate(("owl", "jay")):
            picture(root / f"{split}/{name}/1.png", number + 1)


def test_a_folder_of_images_is_read(tmp_path: Path) -> None:
    image_folder(tmp_path / "birds")
    data = opened(tmp_path / "birds", val="validation")["train"]
    assert data.classes == {"label": ("jay", "owl")}
    assert [(int(each["image"][0, 0, 0]), int(each["label"])) for each in (data[0], data[1])] == [(2, 0), (1, 1)]
    assert data.files(0) == {"image": tmp_path / "birds/train/jay/1.png"}
    (tmp_path / "birds/train/jay/1.png").unlink()
    with pytest.raises(DataError, match=r"birds, train\[0\]: image: .*jay/1\.png: No such file or directory"):
        data.read(0, ["image"])


def test_images_outside_of_the_folder_are_refused_unless_allowed(tmp_path: Path) -> None:
    picture(tmp_path / "other/1.png")
    paths = [str(tmp_path / "other/1.png"), "https://example.com/1.png"]
    rows = {"image": [{"bytes": None, "path": path} for path in paths], "label": [0, 1]}
    features = Features({"image": {"bytes": Value("binary"), "path": Value("string")}, "label": Value("int64")})
    Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "a"))
    feature(tmp_path / "a", "image", {"_type": "Image"})
    stored = opened(tmp_path / "a", outside=True)["train"]
    assert stored[0]["image"].shape == (1, 3, 4)
    with pytest.raises(DataError, match=r"a, train\[0\]: image: .*1\.png: lies outside of .*; data\.outside"):
        opened(tmp_path / "a")["train"].read(0, ["image"])
    with pytest.raises(DataError, match=r"a, train\[1\]: image: https://.*: expected a local file"):
        stored.read(1, ["image"])


def test_a_data_set_of_the_hub_comes_from_the_local_cache(tmp_path: Path) -> None:
    """Stands in for a download, which takes a network: the folder is what the library keeps of one."""
    made = Dataset.from_dict({"image": pictures(3), "label": [0, 1, 0]})
    (tmp_path / "birds").mkdir()
    made.to_parquet(str(tmp_path / "birds/train-00000-of-00001.parquet"))
    opened(tmp_path / "birds")
    shutil.move(tmp_path / "cache/birds", tmp_path / "cache/me___birds")
    data = opened("me/birds")["train"]
    assert len(data) == 3 and data.where(1) == "me/birds, train[1]"


# Whether it is the same


def digests(place: Path) -> list[str | None]:
    data = opened(place, {"label": "class", "mask": "mask"})["train"]
    return [data.identity(range(len(data)), name) for name in ("image", "label", "mask")]


def test_edited_data_is_noticed(tmp_path: Path) -> None:
    columns = {"label": [0, 1], "mask": pictures(2, "L")}
    saved(tmp_path / "a", columns)
    before = digests(tmp_path / "a")
    assert None not in before and before == digests(tmp_path / "a") and len(set(before)) == 3
    shutil.rmtree(tmp_path / "a")
    saved(tmp_path / "a", columns | {"label": [1, 0]})
    after = digests(tmp_path / "a")
    assert [one == other for one, other in zip(before, after, strict=True)] == [False] * 3
    data = opened(tmp_path / "a")["train"]
    assert data.identity([0]) != data.identity([1])


def test_edited_parquet_is_noticed_and_a_cache_made_again_is_not(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"

    def written(value: int) -> None:
        images = [Image.new("L", (4, 3), value)] * 2
        Dataset.from_dict({"image": images, "label": [0, 1], "mask": images}).to_parquet(str(file))

    written(1)
    before = digests(file)
    shutil.rmtree(tmp_path / "cache")
    assert digests(file) == before
    written(2)
    assert digests(file)[0] != before[0] and digests(file)[1] == before[1]


def test_an_edited_image_of_a_folder_is_noticed(tmp_path: Path) -> None:
    image_folder(tmp_path / "birds")
    data = opened(tmp_path / "birds")["train"]
    before = data.identity([0, 1])
    picture(tmp_path / "birds/train/jay/1.png", 9)
    assert data.identity([0, 1]) != before and opened(tmp_path / "birds")["train"].identity([0, 1]) != before


# Mistakes


def test_everything_that_is_wrong_with_the_columns_is_reported_at_once(tmp_path: Path) -> None:
    saved(tmp_path / "a", {"lable": [0, 1], "age": ["1", "2"], "tags": [0, 1]}, None)
    kinds: dict[str, LabelKind] = {"label": "class", "age": "mask", "tags": "tags", "lable": "points"}
    assert whats_wrong(tmp_path / "a", kinds, image="imge") == [
        "a, train has no column 'label'; nearest: lable",
        "a, train: age: the task learns a mask; expected Image, Array2D, Array3D or binary, got Value('string')",
        "data.image: a, train has no column 'imge'; nearest: image",
    ]
    assert whats_wrong(tmp_path / "a", {"image": "mask"})[0] == "'image' is the name of the images, and of no label"
    message = "data.image: a, train: age: expected Image, Array2D, Array3D or binary, got Value('string')"
    assert whats_wrong(tmp_path / "a", {}, image="age") == [message]


def test_features_that_no_task_of_the_kind_takes_are_reported(tmp_path: Path) -> None:
    names = ClassLabel(names=["x", "y"])
    saved(
        tmp_path / "a",
        {"one": [0, 1], "many": [[0], [1]], "when": ["2020-01-01", "2020-01-02"]},
        {"one": names, "many": List(names), "when": Value("string")},
    )
    assert whats_wrong(tmp_path / "a", {"one": "tags", "many": "class"}) == [
        "a, train: one: the task learns tags; expected a list of ClassLabel, got one ClassLabel",
        "a, train: many: the task learns class; expected ClassLabel, text or a number, got List",
    ]


def test_rows_that_are_wrong_are_reported_with_their_places(tmp_path: Path) -> None:
    images: list[Any] = pictures(5)
    images[3] = None
    Dataset.from_dict(
        {"image": images, "label": [0, 1, 7, 0, 7], "size": [[1.0, 2.0], [1.0], None, [1.0, 1e99], [0.0, 0.0]]},
        features=Features(
            {"image": datasets.Image(), "label": Value("int64"), "size": List(Value("float64"))},
        ),
    ).save_to_disk(str(tmp_path / "a"))
    feature(tmp_path / "a", "label", {"names": ["x", "y"], "_type": "ClassLabel"})
    assert whats_wrong(tmp_path / "a", {"label": "class", "size": "numbers"}) == [
        "a, train[2]: label: expected a number below 2, as there are 2 names, got 7 (and in 1 more row)",
        "a, train[1]: size: expected 2 numbers as in the first labelled row of training, got 1",
        "a, train[3]: size: expected a number of 32 bits, got '1e+99'",
        "a, train[3]: image: expected an image, got none",
    ]


def test_splits_whose_classes_differ_are_reported(tmp_path: Path) -> None:
    def one(names: list[str]) -> Dataset:
        features = Features({"image": datasets.Image(), "label": ClassLabel(names=names)})
        return Dataset.from_dict({"image": pictures(2), "label": [0, 1]}, features=features)

    DatasetDict({"train": one(["x", "y"]), "test": one(["y", "x"])}).save_to_disk(str(tmp_path / "a"))
    message = "a, test: label: expected the same class names in the same order as in train"
    assert whats_wrong(tmp_path / "a", val="test") == [message]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": "trn"}, r"^data\.train: .*/a has no split 'trn'; it has train, validation; nearest: train"),
        ({"val": "train[:"}, r"^data\.val: expected a split, such as train or train\[:90%\], got train\[:"),
        ({"config": "small"}, r"^data\.config: .*/a was written by save_to_disk"),
        ({"scale": {"label": 2.0}}, r"^data\.scale\.label: no task learns a depth"),
        ({"path": "nowhere/at/all"}, r"^data\.path: nowhere/at/all: no such file or folder; .* named owner/name"),
        ({"path": "mnist"}, r"^data\.path: mnist: no such file or folder; .* named owner/name"),
        ({"path": "me/none"}, r"^data\.path: me/none: "),
        ({"path": "empty"}, r"^data\.path: empty: "),
        ({"path": "a.csv"}, r"^data\.path: a\.csv: expected a folder, or a file that ends in \.parquet"),
        ({"path": "bad.parquet"}, r"^data\.path: bad\.parquet: "),
        ({"path": "script"}, r"^data\.path: script: .*no longer supported"),
    ],
)
def test_what_cannot_be_had_is_blamed_on_its_key(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    two_splits(tmp_path / "a")
    for name in ("empty", "script"):
        (tmp_path / name).mkdir()
    (tmp_path / "script/script.py").write_text("raise SystemExit('this ran')")
    for name in ("a.csv", "bad.parquet"):
        (tmp_path / name).write_text("image,label\n")
    with pytest.raises(SettingError, match=message):
        opened(settings.get("path", tmp_path / "a"), **{key: value for key, value in settings.items() if key != "path"})


def test_damaged_files_are_reported(tmp_path: Path) -> None:
    two_splits(tmp_path / "a")
    (tmp_path / "a/train/data-00000-of-00001.arrow").write_bytes(b"ARROW1 no")
    with pytest.raises(SettingError, match=r"^data\.path: .*/a: "):
        opened(tmp_path / "a")


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(SettingError, match=r"^data\.name: .* pip install 'mtl-freeze\[datasets\]'"):
        opened(tmp_path)


def test_nothing_is_said_and_nothing_written_outside_of_the_cache(tmp_path: Path) -> None:
    made = Dataset.from_dict({"image": pictures(4), "label": [0, 1, 1, 0]})
    made.save_to_disk(str(tmp_path / "saved"))
    made.to_parquet(str(tmp_path / "a.parquet"))
    code = (
        "from mtl.config.hub_data import HuggingFaceData as D\n"
        "from mtl.data.files.hub import open_hub\n"
        "for path in ('saved', 'a.parquet'):\n"
        "    data = open_hub(D(name='huggingface', path=path, val='train'), {'label': 'class'}, ['train'])['train']\n"
        "    assert len(data[3]) == 2\n"
        "    assert not __import__('datasets').are_progress_bars_disabled()\n"
    )
    (tmp_path / "home").mkdir()
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    own = {"HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    own |= {"PYTHONPATH": ":".join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=own, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    after = {file for file in tmp_path.rglob("*") if before.get(file) != file.stat().st_mtime_ns} - {tmp_path}
    assert after and {file.relative_to(tmp_path).parts[0] for file in after} == {"hf"}
