"""`mtl data` as a user meets it: what is in a data set, and all that is wrong with it at once."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from mtl.cli import main
from runs import tiny_config

PHASES = [{"name": "a", "freeze": ["trunk"], "steps": 1}]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """12 pictures of two sizes with a class, two numbers, a mask, a depth; some of each are missing."""
    rows = [["file", "kind", "wing", "parts", "distance"]]
    for number in range(12):
        size = (20, 30) if number % 2 else (24, 24)
        Image.fromarray(np.full((*size, 3), 10 * number, np.uint8)).save(tmp_path / f"{number}.png")
        Image.fromarray(np.full(size, number % 3, np.uint8)).save(tmp_path / f"{number}-parts.png")
        Image.fromarray(np.full(size, 1000 + number, np.uint16)).save(tmp_path / f"{number}-far.png")
        kind, wing = ("", "jay", "owl")[number % 3], f"{number / 2};1" if number else ""
        parts = f"{number}-parts.png" if number > 3 else ""
        rows.append([f"{number}.png", kind, wing, parts, f"{number}-far.png"])
    with (tmp_path / "birds.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    tasks: dict[str, Any] = {
        "kind": {"type": "classification"},
        "wing": {"type": "regression", "num_outputs": 2},
        "parts": {"type": "segmentation", "num_classes": 3},
        "distance": {"type": "depth"},
    }
    place = str(tmp_path / "birds.csv")
    data = {"name": "table", "train": place, "val": place, "image": "file", "scale": {"distance": 0.001}}
    tiny_config(tmp_path, data=data | {"image_size": 32}, tasks=tasks, phases=PHASES, balance="uw")
    return tmp_path


def test_a_sound_data_set_is_described(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = table / "samples.png"
    assert main(["data", "check", str(table / "tiny.yaml"), "--picture", str(picture)]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.splitlines()[:5] == [
        "table, train: 12 images, 20-24 x 24-30 pixels, channels 3, 0 to 110, mean 55.1",
        "  kind: 8 of 12 labelled; jay 50 %, owl 50 %",
        "  wing: 11 of 12 labelled; 0.5 to 5.5, mean 2",
        "  parts: 8 of 12 labelled; 2 37.8 %, 1 37.2 %, 0 25 %",
        "  distance: 12 of 12 labelled; 1 to 1.011, mean 1.006",
    ]
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert not (table / "runs").exists()


def test_all_that_is_wrong_is_named_at_once(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (table / "2.png").unlink()
    (table / "4.png").write_bytes((table / "4.png").read_bytes()[:60])
    Image.fromarray(np.full((20, 30), 7, np.uint8)).save(table / "5-parts.png")
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(table / "6-far.png")
    assert main(["data", "check", str(table / "tiny.yaml"), "data.num_val=12"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "table, train" in line]
    for line, (row, what) in zip(
        lines,
        [
            (4, "No such file or directory"),
            (6, "truncated"),
            (7, "the task has no class 7"),
            (8, "expected the image's size, 24 x 24 pixels, got 9 x 9"),
        ],
        strict=True,
    ):
        assert line.startswith("error: table, train: ") and f"birds.csv, line {row}: " in line and what in line


def test_generated_data_is_described_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(tiny_config(tmp_path))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("scenes, train: 40 images, 32 x 32 pixels, channels 3, 0 to 25")
    assert any(line.startswith("  object: 40 of 40 labelled; ") for line in lines)
    assert any(line.startswith("  normals: 40 of 40 labelled; mean (") for line in lines)
    assert main(["data", "check", str(tiny_config(tmp_path)), "data.memory_gb=0"]) == 0
    assert capsys.readouterr().out.splitlines() == lines, "read from the data cache, it is the same"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "tiny.yaml", "--picture", "x.jpg"], "--picture: expected a name that ends in .png, got x.jpg"),
        (["check", "tiny.yaml", "data.imge=file"], "data.imge: unknown key; nearest: image"),
        (["check", "tiny.yaml", "tasks.kind.label=knd"], "command line: tasks.kind.label: {}/birds.csv has no column"),
        (["prepare", "tiny.yaml"], "data.name: table has nothing to prepare; public data sets may"),
        (["check", "none.yaml"], "none.yaml"),
    ],
)
def test_a_mistake_is_one_clear_message(
    table: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(table)
    assert main(["data", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and message.format(table) in said.err


def test_labels_that_there_are_not_are_named_at_their_keys_with_the_lines_all_at_once(
    table: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(table)
    settings = yaml.safe_load(Path("tiny.yaml").read_text())
    tasks = {"kind": {"type": "classification", "label": "knd"}, "age": {"type": "regression"}}
    settings["data"] = {**settings["data"], "val": str(table / "none.csv"), "scale": {}}
    Path("tiny.yaml").write_text(yaml.safe_dump(settings | {"tasks": tasks}, sort_keys=False))
    lines = Path("tiny.yaml").read_text().splitlines()
    kind, age = (1 + lines.index(line) for line in ("    label: knd", "  age:"))
    assert main(["data", "check", "tiny.yaml"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: tiny.yaml:{kind}: tasks.kind.label: {table}/birds.csv has no column 'knd'; nearest: kind",
        f"error: tiny.yaml:{age}: tasks.age: {table}/birds.csv has no column 'age'; if the task has another name than"
        " its label, set label",
        f"error: {table}/none.csv: No such file or directory",
    ]


@pytest.mark.parametrize(
    ("data", "task", "message"),
    [
        ({"name": "folder", "train": "t", "val": "t", "masks": {"parts": "m"}, "images": "i"},
         "prts: {type: segmentation, num_classes: 3}",
         "tasks.prts: the data set has no label 'prts'; it has parts; nearest: parts; if the task has another name"),
        ({"name": "coco", "train": "a.json", "val": "a.json", "images": "i"},
         "a: {type: multilabel, label: tgs}",
         "tasks.a.label: COCO's annotations have masks as segmentation, and tags as tags, got 'tgs' as tags"),
        ({"name": "nyuv2_mtan", "root": "t"}, "a: {type: depth, label: dpth}",
         "tasks.a.label: nyuv2_mtan has no label 'dpth'; it has segmentation, depth, normals; nearest: depth"),
    ],
    ids=lambda each: each["name"] if isinstance(each, dict) else "",
)  # fmt: skip
def test_other_data_sets_name_the_key_too(
    data: dict[str, str],
    task: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tiny_config(tmp_path, data=data, tasks=yaml.safe_load(f"{{{task}}}"))
    assert main(["data", "check", str(file)]) == 2
    assert re.match(rf"error: {re.escape(str(file))}:\d+: {re.escape(message)}", capsys.readouterr().err)
