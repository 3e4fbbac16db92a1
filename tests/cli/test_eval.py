"""`mtl eval` and `mtl predict`: a trained model is measured and used, and its run stays as it is."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import mtl
from mtl.cli import main
from mtl.config import load_config
from mtl.data.files.reading import read_depth, read_mask, read_normals
from mtl.results.evaluate import evaluate
from mtl.results.trained import load
from mtl.training.setup import assemble
from once import made_once
from runs import read_metrics, tiny_config
from trained_runs import CLASSES, every_type_config, table_settings, tiny_run, write_table

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "rooms-run", tiny_run)


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> Path:
        return mtl.train(every_type_config(folder), quiet=True).run_dir

    return made_once(tmp_path_factory, "every-run", make)


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def rows_of(table: Path) -> list[dict[str, str]]:
    with table.open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def refused(capsys: Capture, *arguments: str | Path) -> str:
    """The one message of a call that ends with exit code 2."""
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "Traceback" not in said.err
    return said.err


# --- eval


def test_the_numbers_are_those_that_the_run_printed(rooms: Path, capsys: Capture) -> None:
    before = content_of(rooms)
    assert main(["eval", str(rooms)]) == 0
    said = capsys.readouterr().out
    (row,) = (r for r in read_metrics(rooms) if "val/score" in r and r["step"] == load(rooms).origin.step)
    for name, value in row.items():
        if name.count("/") == 2 and name.startswith("val/"):
            _, task, metric = name.split("/")
            assert re.search(rf"^{task} +{metric} +\S+ +{value:.4f}$", said, flags=re.MULTILINE)
    assert f"score {row['val/score']:.3f}; 20 images of scenes, val" in said
    assert content_of(rooms) == before


def test_json_has_all_digits(rooms: Path, capsys: Capture) -> None:
    assert main(["eval", str(rooms), "--json", "--which", "last", "--tasks", "depth", "--protocol", "eigen"]) == 0
    found = json.loads(capsys.readouterr().out)
    row = [r for r in read_metrics(rooms) if "val/score" in r][-1]
    assert found["metrics"].keys() == {"depth"}
    assert found["metrics"]["depth"]["abs_rel"] == row["val/depth/abs_rel"]
    assert "rmse@eigen" in found["metrics"]["depth"]
    assert (found["checkpoint"], found["step"], found["images"], found["split"]) == ("last", 12, 20, "val")
    assert found["fingerprint"] == load(rooms, "last").origin.fingerprint


def test_other_data_is_measured_with_the_runs_classes(every: Path, tmp_path: Path, capsys: Capture) -> None:
    """Another table, without one of the classes, numbers them otherwise."""
    table = write_table(tmp_path / "data")
    rows = rows_of(table)
    for row in rows:
        row["kind"] = CLASSES[1 + int(row["age"].partition(".")[0]) % 2]
    with table.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump({"data": table_settings(table)}))
    assert main(["eval", str(every), "--data", str(other), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)

    model = load(every)
    val = [row for row in rows if row["split"] == "val"]
    predicted = model.predict([table.parent / row["image"] for row in val], ["kind"], batch_size=4)
    right = [one["kind"]["class"] == row["kind"] for one, row in zip(predicted, val, strict=True)]
    assert found["metrics"]["kind"]["accuracy"] == sum(right) / len(right)
    assert found["images"] == len(val)


def write(file: Path, content: dict[str, Any]) -> Path:
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def test_data_that_does_not_fit_is_refused(every: Path, tmp_path: Path, capsys: Capture) -> None:
    table = write_table(tmp_path / "data", 27)
    text = table.read_text()
    settings = table_settings(table)
    config = write(tmp_path / "other.yaml", {"data": settings})
    table.write_text(text.replace(",bee,", ",elk,"))
    assert "tasks.kind: the data has a class 'elk', which the model has not learned" in refused(
        capsys, "eval", every, "--data", config
    )
    table.write_text(text.replace("kind", "sort"))
    assert "tasks.kind: " in (said := refused(capsys, "eval", every, "--data", config)) and "no column 'kind'" in said
    table.write_text(text.replace(",3,", ",7,"))
    assert "stage: expected classes 0 to 3" in refused(capsys, "eval", every, "--data", config)
    table.unlink()
    assert "table.csv: no such file" in refused(capsys, "eval", every, "--data", config).lower()
    write(config, {"tasks": {}})
    assert f"{config}:1: data: expected a data set" in refused(capsys, "eval", every, "--data", config)
    write(config, {"data": {"name": "table", "trane": "a.csv"}})
    assert f"{config}:3: data.trane: unknown key; nearest: train" in refused(capsys, "eval", every, "--data", config)


def test_a_size_that_the_trunk_does_not_take_is_named(tmp_path: Path, capsys: Capture) -> None:
    phases = [{"name": "a", "steps": 1, "lr": 1e-3}]
    run = mtl.train(tiny_config(tmp_path, trunk={"name": "test_vit"}, phases=phases), quiet=True).run_dir
    larger = write(tmp_path / "larger.yaml", {"data": {"name": "scenes", "image_size": 64, "num_val": 4}})
    said = refused(capsys, "eval", run, "--data", larger)
    assert "does not fit the model for images of 64 x 64 pixels (size mismatch for trunk.pos_embed" in said
    assert "data.image_size" in said and said.count("\n") == 1


def test_labels_of_other_data_may_have_other_names(every: Path, tmp_path: Path, capsys: Capture) -> None:
    table = write_table(tmp_path / "data")
    same = write(tmp_path / "a.yaml", {"data": table_settings(table)})
    assert main(["eval", str(every), "--data", str(same), "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)
    table.write_text(table.read_text().replace("kind", "sort", 1))
    config = write(tmp_path / "b.yaml", {"data": table_settings(table), "tasks": {"kind": {"label": "sort"}}})
    assert main(["eval", str(every), "--data", str(config), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "test"], "data.name: scenes has no split 'test'; it has train and val"),
        (["--which", "11"], "has no checkpoint 11; there are: best, last, 12, 10"),
        (["--tasks", "depht"], "no task 'depht'; there are: segmentation, depth, normals, object; nearest: depth"),
        (["--tasks", ""], "no task ''; there are: segmentation, depth, normals, object"),
        (["--protocol", "eigne"], "evaluate.protocol: "),
        (["--device", "cuda:7"], "device: there is no device 'cuda:7' here"),
        (["--data", "nothing.yaml"], "nothing.yaml: no such file"),
    ],
)
def test_what_eval_is_asked_for_in_vain_is_named(
    rooms: Path, arguments: list[str], message: str, capsys: Capture
) -> None:
    assert message in refused(capsys, "eval", rooms, *arguments)


def test_what_is_no_run_is_named(rooms: Path, tmp_path: Path, capsys: Capture) -> None:
    assert "is no run: it has no config.yaml; nearest: tiny" in refused(capsys, "eval", rooms.parent / "tyni")
    out = tmp_path.parent / "out"
    assert "is no run: it has no config.yaml" in refused(capsys, "predict", tmp_path, "a.png", "--out", out)


# --- predict


def test_files_of_predictions_hold_what_predict_gives(every: Path, tmp_path: Path, capsys: Capture) -> None:
    before, images, out = content_of(every), tmp_path / "images", tmp_path / "out"
    (images / "deep").mkdir(parents=True)
    random = np.random.default_rng(0)
    for name, size in (("a.png", (20, 31)), ("deep/b.jpg", (50, 40)), ("deep/c.png", (32, 48))):
        Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8)).save(images / name)
    assert main(["predict", str(every), str(images), "--out", str(out)]) == 0
    assert content_of(every) == before
    model = load(every)
    files = [images / "a.png", images / "deep/b.jpg", images / "deep/c.png"]
    shown = json.loads((out / "predictions.json").read_text())
    assert shown["fingerprint"] == model.origin.fingerprint
    assert [each["image"] for each in shown["images"]] == [*map(str, files)]
    rows = rows_of(out / "predictions.csv")
    names, predicted = ("a", "deep/b", "deep/c"), model.predict(files)
    for name, each, row, found in zip(names, shown["images"], rows, predicted, strict=True):
        assert torch.equal(read_mask(out / f"parts/{name}.png").long(), found["parts"])
        with Image.open(out / f"parts/{name}.png") as mask:
            assert mask.mode == "P"
        for task in ("depth", "bins"):
            assert (read_depth(out / f"{task}/{name}.png", 0.001) - found[task]).abs().max() <= 0.000502
            with Image.open(out / f"{task}_picture/{name}.png") as picture:
                assert picture.size == found[task].shape[:0:-1]
        cosine = (read_normals(out / f"normals/{name}.png") * found["normals"]).sum(dim=0)
        assert cosine.min() > 0.9999
        edges = read_mask(out / f"edges/{name}.png").float() / 255
        assert (edges - found["edges"]).abs().max() <= 0.5 / 255 + 1e-6
        assert each["kind"] == found["kind"] and row["kind.class"] == found["kind"]["class"]
        assert float(row["age"]) == each["age"] == found["age"]
        assert each["joints"] == found["joints"].tolist()
    assert "predictions for 3 images" in capsys.readouterr().out


def test_labels_of_predictions_are_read_as_a_table(every: Path, tmp_path: Path, capsys: Capture) -> None:
    table, out = write_table(tmp_path / "data", 9), tmp_path / "out"
    assert main(["predict", str(every), str(table.parent / "image"), "--out", str(out), "--to-labels"]) == 0
    said = capsys.readouterr().out
    rows = rows_of(out / "labels.csv")
    # By a column: a hash of paths could leave too few images to train.
    with (out / "labels.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [*rows[0], "split"])
        writer.writeheader()
        writer.writerows(row | {"split": "val" if place % 2 else "train"} for place, row in enumerate(rows))
    model = load(every)
    assert {row["predicted_by"] for row in rows} == {model.origin.fingerprint}
    own = yaml.safe_load(said.partition("labels: ")[2])
    data = own["data"] | {"image_size": [32, 48], "batch_size": 4, "split": {"by": "column"}}
    assert data.pop("scale") == {"depth": 0.001, "bins": 0.001}
    kinds = {each["kind"]["class"] for each in model.predict([row["image"] for row in rows], ["kind"])}
    tasks = yaml.safe_load((every / "config.yaml").read_text())["tasks"]
    tasks = {name: task for name, task in tasks.items() if name not in ("teacher", "bins")}
    tasks["kind"] = {"type": "classification", "num_classes": 3}
    data["scale"] = {"depth": 0.001}
    config = {"name": "student", "trunk": {"name": "test_resnet"}, "data": data, "tasks": tasks}
    config |= {"phases": [{"name": "a", "steps": 1, "lr": 1e-3}]}
    parts = assemble(load_config(write(tmp_path / "student.yaml", config)), quiet=True)
    assert {*parts.source.classes["kind"]} <= kinds
    images = [file for split in (parts.train, parts.val) for file in range(len(split))]
    assert len(images) == len(rows) == 9
    # What the table says of an image is what the model says of it.
    by_image = {Path(row["image"]).name: row for row in rows}
    for name, row in by_image.items():
        found = model.predict(table.parent / "image" / name)
        assert row["kind"] == found["kind"]["class"] and row["stage"] == found["stage"]["class"]
        assert float(row["age"]) == pytest.approx(found["age"])
        assert torch.equal(read_mask(out / row["edges"]).long(), (found["edges"] >= 0.5).long())
        tags = {tag for tag, share in found["tags"].items() if share >= 0.5}
        assert {*filter(None, row["tags"].split(";"))} == tags


def test_a_bad_file_is_left_out_and_the_exit_code_says_so(every: Path, tmp_path: Path, capsys: Capture) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for number in range(40):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(images / f"{number:02}.png")
    (images / "17.png").write_bytes(b"no picture")
    (images / "18.png").write_bytes((images / "18.png").read_bytes()[:40])
    assert main(["predict", str(every), str(images), "--out", str(out), "--batch-size", "7"]) == 2
    said = capsys.readouterr()
    first, second = said.err.splitlines()
    assert "17.png" in first and "18.png" in second
    names = {f"{number:02}" for number in range(40)} - {"17", "18"}
    assert {file.stem for file in (out / "parts").iterdir()} == names
    shown = json.loads((out / "predictions.json").read_text())["images"]
    assert [Path(each["image"]).stem for each in shown] == sorted(names)
    model = load(every)
    for each in (shown[3], shown[30]):
        assert each["age"] == pytest.approx(model.predict(each["image"], ["age"])["age"], rel=1e-5)


def test_files_are_named_one_by_one_or_by_patterns(every: Path, tmp_path: Path, capsys: Capture) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.new("L", (9, 7), 100).save(tmp_path / folder / "x.png")
    Image.new("RGB", (9, 7)).save(tmp_path / "a/x.bmp")
    arguments = ["predict", str(every), str(tmp_path / "a" / "x.*"), "--tasks", "parts,age"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert {file.name for file in (tmp_path / "out/parts").iterdir()} == {"x.bmp.png", "x.png.png"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"parts", "predictions.json", "predictions.csv"}
    said = refused(capsys, "predict", every, tmp_path / "a/x.png", tmp_path / "b/x.png", "--out", tmp_path / "o")
    assert f"{tmp_path}/a/x.png and {tmp_path}/b/x.png would both be written as x.png; name a folder" in said


def test_what_is_there_is_not_overwritten_without_force(every: Path, tmp_path: Path, capsys: Capture) -> None:
    image, out = tmp_path / "x.png", tmp_path / "out"
    Image.new("RGB", (9, 7)).save(image)
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    said = refused(capsys, "predict", every, image, "--out", out)
    assert said == f"error: --out: {out} is not empty; --force writes into it, over files of the same names\n"
    assert [*out.iterdir()] == [out / "mine.txt"]
    assert main(["predict", str(every), str(image), "--out", str(out), "--force"]) == 0
    assert (out / "mine.txt").read_text() == "mine" and (out / "parts/x.png").is_file()
    assert "lies in the run's directory" in refused(capsys, "predict", every, image, "--out", every / "out")
    assert "is no folder" in refused(capsys, "predict", every, image, "--out", image)


def test_what_is_not_there_is_named(every: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "image.png").touch()
    for named, message in (
        (tmp_path / "empty", "has no image and no video; they end in .png, .jpg"),
        (tmp_path / "imag.png", "imag.png: no such file or folder; nearest: image.png"),
        (tmp_path / "*.jpg", "no file matches"),
    ):
        assert message in refused(capsys, "predict", every, named, "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    assert main(["predict", str(every), str(tmp_path / "image.png"), "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


def test_a_video_gives_a_picture_for_each_frame(every: Path, tmp_path: Path, capsys: Capture) -> None:
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(5):
            pixels = np.full((48, 64, 3), 50 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    out = tmp_path / "out"
    assert main(["predict", str(every), str(tmp_path / "clip.mp4"), "--out", str(out), "--tasks", "parts,age"]) == 0
    assert sorted(file.name for file in (out / "parts/clip").iterdir()) == [f"{n:06}.png" for n in range(5)]
    shown = json.loads((out / "predictions.json").read_text())["images"]
    assert [each["frame"] for each in shown] == [*range(5)]
    assert read_mask(out / "parts/clip/000000.png").shape == (48, 64)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    capsys.readouterr()
    assert main(["predict", str(every), str(tmp_path / "bad.mp4"), "--out", str(tmp_path / "o")]) == 2
    assert "bad.mp4: cannot be decoded" in capsys.readouterr().err
    said = refused(capsys, "predict", every, tmp_path / "clip.mp4", "--out", tmp_path / "o", "--to-labels")
    assert "a table has labels of image files" in said


def test_the_test_split_is_measured(every: Path, capsys: Capture) -> None:
    assert main(["eval", str(every), "--split", "test", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metrics"]["age"]["mae"] == evaluate(load(every), "test").metrics["age"]["mae"]
