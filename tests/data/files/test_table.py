"""A data set in a table: what is read, how it is divided, and what is said of each mistake."""

from __future__ import annotations

import math
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtl.config import SettingError
from mtl.config.file_data import TableData
from mtl.data.cache import DataError
from mtl.data.files.problems import problems
from mtl.data.files.table import Table, label_names, read_tables
from mtl.tasks.base import LabelKind
from tables import picture, table


def whats_wrong(*arguments: Any, **more: Any) -> list[str]:
    with pytest.raises(DataError) as error:
        table(*arguments, **more)
    return str(error.value).splitlines()


# What is read


def test_every_kind_of_label_is_read_as_its_task_takes_it(tmp_path: Path) -> None:
    picture(tmp_path / "i/1.png", (1, 2, 3), mode="RGB")
    picture(tmp_path / "m/1.png", 5)
    picture(tmp_path / "d/1.png", 1500, mode="I;16")
    np.save(tmp_path / "n.npy", np.tile([0.0, 0.0, -2.0], (3, 4, 1)))
    text = (
        "image,species,kinds,flags,age,size,mask,depth,normals,points\n"
        'i/1.png,lynx,b;a,1;0;?,1.5,1;-2e1,m/1.png,d/1.png,n.npy,"1,2,2;0.5,0,1;"\n'
        "i/2.png,cat,;,0;0;1,2,3;?,,,,\n"
        "i/3.png,,,,,,,,,\n"
    )
    kinds: dict[str, LabelKind] = {
        "species": "class",
        "kinds": "tags",
        "flags": "tags",
        "age": "numbers",
        "size": "numbers",
        "mask": "mask",
        "depth": "depth",
        "normals": "normals",
        "points": "points",
    }
    data = table(tmp_path, text, kinds, scale={"depth": 0.001})
    assert len(data) == 3 and data.labels == tuple(kinds)
    item = data[0]
    assert {name: (value.dtype, tuple(value.shape)) for name, value in item.items()} == {
        "image": (torch.uint8, (3, 3, 4)),
        "species": (torch.int64, ()),
        "kinds": (torch.float32, (2,)),
        "flags": (torch.float32, (3,)),
        "age": (torch.float32, ()),
        "size": (torch.float32, (2,)),
        "mask": (torch.uint8, (3, 4)),
        "depth": (torch.float32, (1, 3, 4)),
        "normals": (torch.float32, (3, 3, 4)),
        "points": (torch.float32, (3, 3)),
    }
    assert item["image"][:, 0, 0].tolist() == [1, 2, 3]
    assert item["species"] == 1 and item["kinds"].tolist() == [1, 1] and item["age"] == 1.5
    assert item["flags"][:2].tolist() == [1, 0] and item["flags"][2].isnan()
    assert item["size"].tolist() == [1, -20]
    assert (item["mask"] == 5).all() and torch.allclose(item["depth"], torch.tensor(1.5))
    assert item["normals"][:, 0, 0].tolist() == [0, 0, -1]
    assert item["points"].tolist() == [[1, 2, 2], [0.5, 0, 1], [0, 0, 0]]
    second = data.read(1, [name for name in kinds if name not in ("mask", "depth", "normals")])
    assert second["kinds"].tolist() == [0, 0] and second["size"][0] == 3 and second["size"][1].isnan()
    assert data.read(2, list(kinds)) == {}
    assert data.files(0) == {
        "image": tmp_path / "i/1.png",
        "mask": tmp_path / "m/1.png",
        "depth": tmp_path / "d/1.png",
        "normals": tmp_path / "n.npy",
    }
    assert data.files(2) == {"image": tmp_path / "i/3.png"}
    assert data.classes == {"species": ("cat", "lynx"), "kinds": ("a", "b"), "flags": ("0", "1", "2")}


def test_a_column_holds_the_label_of_every_row(tmp_path: Path) -> None:
    kinds: dict[str, LabelKind] = {"a": "class", "b": "tags", "c": "numbers", "d": "mask", "e": "points"}
    text = 'image,a,b,c,d,e\n1,y,p;q,0.1,m,"1,2,1"\n2,,,16777217,,\n3,x,q,?,,"3,4,0"\n'
    data = table(tmp_path, text, kinds)
    columns = {name: data.column(name) for name in kinds}
    none = math.nan
    for name, expected in {
        "a": [1, none, 0],
        "b": [[1, 1], [none, none], [0, 1]],
        "c": [0.1, 16777217, none],
        "e": [[[1, 2, 1]], [[none] * 3], [[3, 4, 0]]],
    }.items():
        column = columns[name]
        assert column is not None
        np.testing.assert_array_equal(column.numpy(), np.array(expected, np.float64))
    assert columns["d"] is None


def test_class_numbers_stay_as_they_are(tmp_path: Path) -> None:
    data = table(tmp_path, "image,label\n1,3\n2,-1\n3,0\n4,2.0\n5,\n")
    assert data.classes == {"label": ("0", "1", "2", "3")}
    assert [data.read(index, ["label"]).get("label") for index in range(5)] == [3, None, 0, 2, None]


def test_one_name_among_numbers_makes_all_of_them_names(tmp_path: Path) -> None:
    assert table(tmp_path, "image,label\n1,10\n2,9\n3,b\n").classes == {"label": ("10", "9", "b")}


def splits_of(folder: Path, text: str, split: dict[str, Any]) -> dict[str, Table]:
    """Every split of one table, which is read once."""
    (folder / "a.csv").write_text(text)
    data = TableData.model_validate({"name": "table", "train": str(folder / "a.csv"), "split": split})
    kinds: dict[str, LabelKind] = {"label": "class"}
    tables = read_tables(data, kinds)
    return {name: Table(data, name, kinds, tables) for name in ("train", "val", "test") if name in tables.parts}


def labels(data: Table) -> list[float]:
    column = data.column("label")
    assert column is not None
    return [float(label) for label in column]


def test_a_column_divides_a_table_and_classes_are_those_of_training(tmp_path: Path) -> None:
    text = "image,label,split\n1,b,train\n2,a,train\n3,a,val\n4,b,test\n"
    splits = splits_of(tmp_path, text, {"by": "column"})
    assert {name: labels(data) for name, data in splits.items()} == {"train": [1, 0], "val": [0], "test": [1]}
    assert all(data.classes == {"label": ("a", "b")} for data in splits.values())
    assert splits["val"].where(0) == f"{tmp_path}/a.csv, line 4"
    assert splits["val"].files(0) == {"image": tmp_path / "3"}


def test_a_hash_divides_by_the_path_alone(tmp_path: Path) -> None:
    def division(paths: list[str]) -> dict[str, str]:
        text = "image,label\n" + "".join(f"{path},1\n" for path in paths)
        splits = splits_of(tmp_path, text, {"by": "hash", "val": 0.2, "test": 0.1})
        return {data.files(n)["image"].name: name for name, data in splits.items() for n in range(len(data))}

    paths = [f"{number}.png" for number in range(2000)]
    found = division(paths)
    shares = [sum(split == name for split in found.values()) / 2000 for name in ("train", "val", "test")]
    assert shares == pytest.approx([0.7, 0.2, 0.1], abs=0.03)
    assert division([*reversed(paths), "another.png"]).items() >= found.items()


def test_a_hash_gives_the_same_split_for_ever(tmp_path: Path) -> None:
    text = "image,label\n" + "".join(f"{number},1\n" for number in range(12))
    splits = splits_of(tmp_path, text, {"by": "hash", "val": 0.5})
    assert [splits["val"].files(n)["image"].name for n in range(len(splits["val"]))] == ["2", "3", "4", "5", "7"]


def test_tables_of_their_own_for_each_split(tmp_path: Path) -> None:
    for name, row in {"train": "1,a\n2,b", "val": "3,b", "test": "4,a"}.items():
        (tmp_path / f"{name}.csv").write_text(f"image,label\n{row}\n")
    places = {name: str(tmp_path / f"{name}.csv") for name in ("train", "val", "test")}
    data = TableData.model_validate({"name": "table", **places})
    assert [labels(Table(data, name, {"label": "class"})) for name in ("train", "val", "test")] == [[0, 1], [1], [0]]


def test_columns_that_can_be_labels(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("file,x,part,,y\n")
    split = {"by": "column", "column": "part"}
    data = {"name": "table", "train": str(tmp_path / "a.csv"), "image": "file", "split": split}
    assert label_names(TableData.model_validate(data)) == ("x", "y")


# How files are written


@pytest.mark.parametrize(
    "text",
    [
        "image,label\n1,a\n2,b\n",
        "image,label\n1,a\n2,b",
        "\ufeffimage,label\r\n1,a\r\n2,b\r\n",
        "image,label\r1,a\r2,b\r",
        " image , label\n 1 ,\ta\n2 , b \n",
        '"image","label"\n"1" , "a" \n"2","b"\n',
        "\n\nimage,label\n\n1,a\n2,b\n\n",
    ],
)
def test_ways_to_write_the_same_table(tmp_path: Path, text: str) -> None:
    data = table(tmp_path, text)
    assert [data.files(index)["image"].name for index in range(len(data))] == ["1", "2"]
    assert labels(data) == [0, 1] and data.classes == {"label": ("a", "b")}


def test_quotes_hold_commas_quotes_and_newlines(tmp_path: Path) -> None:
    data = table(tmp_path, 'image,label\n"a,b","x ""y"""\n\n"c\r\nd","1\n2"\nlast,z\n')
    assert [data.files(index)["image"].name for index in range(3)] == ["a,b", "c\r\nd", "last"]
    assert data.classes == {"label": ("1\n2", 'x "y"', "z")}
    assert [data.where(index).rpartition(", ")[2] for index in range(3)] == ["line 2", "line 4", "line 7"]


def test_lines_are_counted_beyond_the_rows_that_are_read_at_once(tmp_path: Path) -> None:
    rows = [f'"{number}\n",a' if number % 1000 == 999 else f"{number},a" for number in range(9001)]
    data = table(tmp_path, "image,label\n" + "\n".join(rows))
    assert len(data) == 9001
    for number in (0, 4094, 4095, 8191, 8192, 9000):
        assert data.where(number).endswith(f", line {number + 2 + number // 1000}")


def test_columns_of_many_different_cells_are_read_like_others(tmp_path: Path) -> None:
    rows = [f"{n},{n / 8},c{n % 4500:04d},{n};?,{'train' if n < 4500 else 'val'}" for n in range(5000)]
    kinds: dict[str, LabelKind] = {"a": "numbers", "b": "class", "c": "numbers"}
    text = "\n".join(["image,a,b,c,split", *rows, "x,,,,val"])
    data = table(tmp_path, text, kinds, which="val", split={"by": "column"})
    a, b, c = (data.column(name) for name in kinds)
    assert a is not None and b is not None and c is not None
    numbers = np.arange(4500, 5000)
    assert data.classes == {"b": tuple(f"c{n:04d}" for n in range(4500))}
    np.testing.assert_array_equal(a, [*(numbers / 8), math.nan])
    np.testing.assert_array_equal(b, [*(numbers - 4500), math.nan])
    np.testing.assert_array_equal(c, [*([number, math.nan] for number in numbers), [math.nan] * 2])
    assert data.read(7, ["a", "b"]) == {"a": 4507 / 8, "b": 7} and data.read(500, ["a", "b"]) == {}


def test_mistakes_among_many_different_cells_are_found(tmp_path: Path) -> None:
    rows = [f"{number},{number / 8}" for number in range(5000)]
    rows[4000], rows[4500] = "4000,1e99", "4500,x"
    assert whats_wrong(tmp_path, "\n".join(["image,label", *rows]), {"label": "numbers"}) == [
        f"{tmp_path}/a.csv, line 4002: label: expected a number of 32 bits, got '1e99'",
        f"{tmp_path}/a.csv, line 4502: label: expected a number, got 'x'",
    ]


def test_exactly_as_many_rows_as_are_read_at_once(tmp_path: Path) -> None:
    for number in (4094, 4095, 4096):
        assert len(table(tmp_path, "image,label\n" + "1,a\n" * number)) == number


def test_parquet_holds_the_same_as_a_csv(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {
        "image": ["1", "2", "3"],
        "label": ["b", "a", None],
        "number": [1, None, 3],
        "real": [0.1, 2.0, math.nan],
        "flags": [[1, 0], None, [0, None]],
        "is": [True, False, None],
        "other": [b"", b"", b""],
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    kinds: dict[str, LabelKind] = {
        "label": "class",
        "number": "class",
        "real": "numbers",
        "flags": "tags",
        "is": "tags",
    }
    text = "image,label,number,real,flags,is\n1,b,1,0.1,1;0,1\n2,a,,2.0,,0\n3,,3,,0;?,\n"
    one = table(tmp_path, text, kinds)
    file = str(tmp_path / "a.parquet")
    other = Table(TableData(name="table", train=file, val=file), "train", kinds)
    for name in kinds:
        a, b = one.column(name), other.column(name)
        assert a is not None and b is not None and torch.equal(a.nan_to_num(-7), b.nan_to_num(-7))
    assert one.classes == other.classes
    assert other.where(2) == f"{file}, row 3"
    with pytest.raises(DataError, match="column 'other': expected text, numbers or lists of them, got bytes"):
        Table(TableData(name="table", train=file, val=file), "train", {"other": "numbers"})
    with pytest.raises(DataError, match=r"a.parquet has no column 'lable'; nearest: label"):
        Table(TableData(name="table", train=file, val=file), "train", {"lable": "class"})
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"a\.parquet: "):
        Table(TableData(name="table", train=file, val=file), "train", kinds)


def test_lists_in_parquet_are_points_tags_and_nothing_else(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    points = [[[1.0, 2.0, 2.0], [0.5, 0.0, 1.0]], None]
    columns = {"image": ["1", "2"], "points": points, "tags": [["a;b"], ["c"]]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    file = str(tmp_path / "a.parquet")
    data = Table(TableData(name="table", train=file, val=file), "train", {"points": "points"})
    assert data.read(0, ["points"])["points"].tolist() == points[0] and data.read(1, ["points"]) == {}
    with pytest.raises(DataError, match=r"column 'tags': .* got a list with the entry 'a;b', which has a semicolon"):
        Table(TableData(name="table", train=file, val=file), "train", {"tags": "tags"})


# Mistakes


@pytest.mark.parametrize(
    ("text", "settings_", "lines"),
    [
        ("", {}, ["a.csv: expected a line with the names of the columns, got an empty file"]),
        ("image,label\n", {}, ["a.csv: expected at least one row below the names of the columns, got none"]),
        ("image,lable\n1,2\n", {}, ["a.csv has no column 'label'; nearest: lable"]),
        ("imge,label\n1,2\n", {}, ["data.image: a.csv has no column 'image'; nearest: imge"]),
        ("image,label\n1,2\n", {"image": "lab"}, ["data.image: a.csv has no column 'lab'; nearest: label"]),
        ("image,label\n1,2\n", {"split": {"by": "column"}}, ["data.split.column: a.csv has no column 'split'"]),
        ("image,label, label\n1,2,3\n", {}, ["a.csv: several columns have the name 'label'"]),
        (
            "image,label\n1,2\n3\n\n4,5,6\n",
            {},
            [
                "a.csv, line 3: expected 2 cells, one for each column, got 1",
                "a.csv, line 5: expected 2 cells, one for each column, got 3",
            ],
        ),
        ('image,label\n1,2\n3,"4\n5,6\n', {}, ["a.csv, line 3: the row has a quote that is never closed"]),
        ('image\n"', {}, ["a.csv has no column 'label'"]),
        ('label,image\n1,2\n3,"', {}, ["a.csv, line 3: the row has a quote that is never closed"]),
        (b"image,label\n1,2\n\xff,3\n", {}, ["a.csv, line 3: expected text in UTF-8"]),
        ("image,label\n1,\n", {}, ["a.csv: label: no row of the training split has a label"]),
        (
            "image,label\n,1\n/etc/passwd,1\na/../../b,1\na/../b,1\n",
            {},
            [
                "a.csv, line 2: image: expected the path of an image, got an empty cell",
                "a.csv, line 3: image: /etc/passwd leaves the folder; data.outside=true allows it",
                "a.csv, line 4: image: a/../../b leaves the folder; data.outside=true allows it",
            ],
        ),
        (
            "image,label,part\n1,a,train\n2,a,vall\n3,a,\n4,a,vall\n",
            {"split": {"by": "column", "column": "part"}},
            [
                "a.csv, line 3: part: expected train, val or test, got 'vall' (and in 1 more row); nearest: val",
                "a.csv, line 4: part: expected train, val or test, got ''",
                "a.csv: no row is in the split 'val'",
            ],
        ),
        (
            "image,label,split\n1,cat,train\n2,cta,val\n3,cta,val\n",
            {"split": {"by": "column"}},
            ["a.csv, line 3: label: class 'cta' is never seen in training (and in 1 more row); nearest: cat"],
        ),
        (
            "image,label,split\n1,0,train\n2,2,train\n3,1,val\n4,3,val\n5,x,val\n6,-1,val\n",
            {"split": {"by": "column"}},
            [
                "a.csv, line 4: label: class 1 is never seen in training",
                "a.csv, line 5: label: class 3 is never seen in training",
                "a.csv, line 6: label: expected a class number as in training, got 'x'",
            ],
        ),
        (
            "image,label\n1,99999999999999999999\n",
            {},
            ["a.csv: label: expected a class number from 0 to 1048575, or -1 for none, got '99999999999999999999'"],
        ),
    ],
)
def test_mistakes_are_reported_with_file_and_line(
    tmp_path: Path, text: str | bytes, settings_: dict[str, Any], lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert whats_wrong(Path(), text, **settings_) == lines


@pytest.mark.parametrize(
    ("kind", "cells", "wrong"),
    [
        ("numbers", ["1", "x"], "expected a number, got 'x'"),
        ("numbers", ["1", "1_0"], "expected a number, got '1_0'"),
        ("numbers", ["1", "inf"], "expected a number, got 'inf'"),
        ("numbers", ["1", "1e39"], "expected a number of 32 bits, got '1e39'"),
        ("numbers", ["1;2", "1;2;3"], "expected 2 numbers as in the first labelled row of training, got 3"),
        ("tags", ["1;0", "1;2"], None),
        ("tags", ["1;0", "1"], "expected 2 numbers as in the first labelled row of training, got 1"),
        ("points", ["1,2,0", "1,2"], "expected x,y,v with v 0, 1 or 2, got '1,2'"),
        ("points", ["1,2,0", "1,2,3"], "expected x,y,v with v 0, 1 or 2, got '1,2,3'"),
        ("points", ["1,2,0", "1,?,1"], "expected x,y,v with v 0, 1 or 2, got '1,?,1'"),
    ],
)
def test_cells_that_do_not_parse(tmp_path: Path, kind: LabelKind, cells: list[str], wrong: str | None) -> None:
    text = "image,label\n" + "".join(f'{number},"{cell}"\n' for number, cell in enumerate(cells))
    if wrong is None:  # a tag of the name 2
        assert table(tmp_path, text, {"label": kind}).classes == {"label": ("0", "1", "2")}
    else:
        assert whats_wrong(tmp_path, text, {"label": kind}) == [f"{tmp_path}/a.csv, line 3: label: {wrong}"]


def test_a_tag_never_seen_in_training(tmp_path: Path) -> None:
    text = "image,label,split\n1,red;green,train\n2,red;grean,val\n"
    (line,) = whats_wrong(tmp_path, text, {"label": "tags"}, split={"by": "column"})
    assert line.endswith("a.csv, line 3: label: tag 'grean' is never seen in training; nearest: green")


def test_a_quote_that_the_last_line_opens_is_found_in_a_table_of_one_column(tmp_path: Path) -> None:
    lines = whats_wrong(tmp_path, 'image\n1\n"', {})
    assert lines == [f"{tmp_path}/a.csv, line 3: the row has a quote that is never closed"]


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)  # as if it were not installed
    file = str(tmp_path / "a.parquet")
    with pytest.raises(
        SettingError, match=r"^data\.train: Parquet needs pyarrow; .* pip install 'mtl-freeze\[parquet\]'"
    ):
        Table(TableData(name="table", train=file, val=file), "train", {})


def test_a_worker_process_reads_the_same(tmp_path: Path) -> None:
    kinds: dict[str, LabelKind] = {"a": "class", "b": "tags", "c": "numbers", "d": "points"}
    data = table(tmp_path, 'image,a,b,c,d\n1,x,p;q,1;2,"1,2,1"\n', kinds)
    copy = pickle.loads(pickle.dumps(data))
    assert {name: label.tolist() for name, label in copy.read(0, list(kinds)).items()} == {
        "a": 0,
        "b": [1, 1],
        "c": [1, 2],
        "d": [[1, 2, 1]],
    }


def test_at_most_twenty_mistakes_are_reported_and_the_others_counted(tmp_path: Path) -> None:
    text = "image,label,split\n1,a,train\n" + "".join(f"{number},b{number},val\n" for number in range(50))
    lines = whats_wrong(tmp_path, text, split={"by": "column"})
    assert len(lines) == 21 and lines[-1] == "and 30 more mistakes"


def test_mistakes_in_all_tables_are_reported_at_once(tmp_path: Path) -> None:
    (tmp_path / "b.csv").write_text("image,label\n1\n")
    lines = whats_wrong(tmp_path, "picture\n1\n", val=str(tmp_path / "b.csv"), test=str(tmp_path / "none.csv"))
    assert [line.removeprefix(f"{tmp_path}/") for line in lines] == [
        "a.csv has no column 'label'",
        f"data.image: {tmp_path}/a.csv has no column 'image'",
        "b.csv, line 2: expected 2 cells, one for each column, got 1",
        "none.csv: No such file or directory",
    ]


def test_settings_that_fit_no_label_or_split(tmp_path: Path) -> None:
    text = "image,label\n1,1\n"
    with pytest.raises(SettingError, match=r"^data.scale.dpth: expected a label .* as a depth, depth; nearest: depth$"):
        table(tmp_path, text, {"depth": "depth"}, scale={"dpth": 1.0})
    with pytest.raises(SettingError, match=r"^data.scale.label: no task learns a depth"):
        table(tmp_path, text, scale={"label": 1.0})
    with pytest.raises(SettingError, match=r"^data.test: this split is required here$"):
        table(tmp_path, text, which="test")
    assert whats_wrong(tmp_path, text, {"image": "mask"}) == ["'image' is the name of the images, and of no label"]


# The files that it names


def test_a_file_that_cannot_be_read_is_reported_with_its_row(tmp_path: Path) -> None:
    picture(tmp_path / "1.png")
    (tmp_path / "2.png").write_bytes((tmp_path / "1.png").read_bytes()[:40])
    data = table(tmp_path, "image,label\n1.png,m.png\n2.png,\n", {"label": "mask"})
    with pytest.raises(DataError, match=r"a\.csv, line 2: label: /.*/m\.png: No such file or directory$"):
        data.read(0, ["label"])
    with pytest.raises(DataError, match=r"a\.csv, line 3: image: /.*/2\.png: "):
        data.read(1, ["image"])


def test_a_link_out_of_the_folder_is_refused_unless_allowed(tmp_path: Path) -> None:
    picture(tmp_path / "other/1.png")
    own = tmp_path / "own"
    own.mkdir()
    (own / "1.png").symlink_to(tmp_path / "other/1.png")
    (own / "2.png").symlink_to("2.png")
    with pytest.raises(DataError, match=r"a\.csv, line 2: image: 1\.png: leads out of .*; data\.outside=true"):
        table(own, "image,label\n1.png,1\n").read(0, ["image"])
    with pytest.raises(DataError, match=r"a\.csv, line 2: image: "):
        table(own, "image,label\n2.png,1\n").read(0, ["image"])
    assert table(own, "image,label\n1.png,1\n", outside=True)[0]["image"].shape == (1, 3, 4)
    assert table(own, "image,label\n../other/1.png,1\n", outside=True)[0]["image"].shape == (1, 3, 4)
    assert table(own, f"image,label\n{tmp_path}/other/1.png,1\n", outside=True)[0]["image"].shape == (1, 3, 4)


def test_every_problem_with_the_files_is_found(tmp_path: Path) -> None:
    picture(tmp_path / "1.png")
    picture(tmp_path / "2.png", size=(5, 3))
    (tmp_path / "3.png").write_text("no picture")
    np.save(tmp_path / "4.npy", np.full((3, 4), -1.0))
    rows = ["1.png,1.png,,1", "1.png,2.png,,9", "3.png,,,1", "1.png,no.png,4.npy,1", "1.png,,1.png,0"]
    kinds: dict[str, LabelKind] = {"mask": "mask", "depth": "depth", "label": "class"}
    data = table(tmp_path, "\n".join(["image,mask,depth,label", *rows]), kinds)
    found = [line.replace(f"{tmp_path}/", "") for line in problems(data, kinds, {"label": range(5), "mask": {7}})]
    assert found == [
        "a.csv, line 3: mask: 2.png: expected the image's size, 4 x 3 pixels, got 5 x 3",
        "a.csv, line 3: label: the task has no class 9",
        "a.csv, line 4: image: 3.png: cannot identify image file",
        "a.csv, line 5: mask: no.png: No such file or directory",
        "a.csv, line 5: depth: 4.npy: 12 of 12 distances are negative or infinite",
    ]
    found = list(problems(data, kinds, {"mask": range(7)}))
    assert sum("the task has no class 7" in line for line in found) == 2
