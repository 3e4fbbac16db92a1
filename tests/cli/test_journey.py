"""The page that leads from a folder of crops to a report, followed to the letter: no Python by the user."""

from __future__ import annotations

import csv
import json
import math
import re
import statistics
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mtl.cli import main
from pages import ROOT, code_block
from runs import read_metrics, read_model

PAGE = "docs/journey.md"
NUM, NUM_TRAIN = 320, 240
SPECIES = ("jay", "owl", "wren")
COLOURS = {"jay": (60, 90, 200), "owl": (180, 140, 80), "wren": (110, 60, 40)}
# What the test changes, since it has little time.
QUICK = ["trunk.name=test_resnet", "trunk.weights=none", "data.image_size=32", "phases.warm-heads.epochs=2"]
QUICK += ["phases.finetune.max_epochs=2", "tracking.mode=disabled"]

Row = dict[str, str]


def draw(number: int, species: str, age: float, marks: list[str], folder: Path) -> None:
    """A crop with its outline and distances: a bird in its colour, paler with age, with bars and a crest."""
    rng = np.random.default_rng(number)
    height, width = 36 + number % 9, 40 + number % 11
    row, column = np.mgrid[:height, :width]
    body = ((row - height / 2) / 12) ** 2 + ((column - width / 2) / 15) ** 2 < 1
    beak = (abs(row - height / 2) < 3) & (column > width / 2 + 12) & (column < width / 2 + 18)
    image = np.full((height, width, 3), (90, 130, 90)) + rng.integers(0, 60, (height, width, 1))
    image[body] = np.array(COLOURS[species]) + 12 * age
    if "barred" in marks:
        image[body & (column % 6 < 3)] -= 50
    if "crested" in marks:
        image[(row < height / 2 - 10) & (abs(column - width / 2) < 5)] = (230, 30, 30)
    image[beak] = (240, 200, 40)
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f"crops/{number:03}.jpg", quality=95)
    outline = (body + 2 * (beak & ~body)).astype(np.uint8)
    outline[: number % 5] = 255
    Image.fromarray(outline).save(folder / f"outlines/{number:03}.png")
    distance = np.where(body | beak, 800 + 100 * age, 3000 + 20 * row).astype(np.uint16)
    distance[:, : number % 7] = 0
    Image.fromarray(distance).save(folder / f"distances/{number:03}.png")


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return [
        {
            "file": f"crops/{number:03}.jpg",
            "part": "train" if number < NUM_TRAIN else "val",
            "species": "" if number % 8 == 3 else SPECIES[number % 3],
            "age": "" if number % 5 == 2 else f"{number % 14 / 2}",
            "marks": "" if number % 9 == 4 else (";", "barred", "crested", "barred;crested")[number % 4],
            "outline": "" if number % 6 == 1 else f"outlines/{number:03}.png",
            "distance": "" if number % 4 == 2 else f"distances/{number:03}.png",
        }
        for number in range(NUM)
    ]


@pytest.fixture
def folder(rows: list[Row], tmp_path: Path) -> Path:
    """The working directory: `birds/` and `birds.yaml`."""
    for name in ("crops", "outlines", "distances"):
        (tmp_path / "birds" / name).mkdir(parents=True)
    for number in range(NUM):
        marks = ["", "barred", "crested", "barred;crested"][number % 4].split(";")
        draw(number, SPECIES[number % 3], number % 14 / 2, marks, tmp_path / "birds")
    with (tmp_path / "birds/birds.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "birds.yaml").write_text(code_block(PAGE, "yaml"))
    return tmp_path


def printed(text: str) -> dict[tuple[str, str], list[float]]:
    """The table of results: of each metric, the trivial predictor and the end of each phase."""
    found = re.findall(r"^(\w+) +(\w+) +((?:-?[\d.]+|nan)(?: +(?:-?[\d.]+|nan))+)$", text, re.MULTILINE)
    return {(task, metric): [float(each) for each in numbers.split()] for task, metric, numbers in found}


def test_the_page_has_a_short_configuration_and_the_table_of_this_test(rows: list[Row]) -> None:
    assert len(code_block(PAGE, "yaml").splitlines()) <= 25
    assert code_block(PAGE, "csv").splitlines()[0] == ",".join(rows[0])


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
def test_from_crops_to_a_report(rows: list[Row], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", "birds.yaml", "--picture", "samples.png"]) == 0
    said = capsys.readouterr().out
    page = (ROOT / PAGE).read_text(encoding="utf-8")
    assert all(line in page for line in said.splitlines()[1:6])
    labelled = {name: sum(bool(row[name]) for row in rows[:NUM_TRAIN]) for name in rows[0]}
    for name in ("species", "age", "marks", "outline", "distance"):
        assert f"  {name}: {labelled[name]} of {NUM_TRAIN} labelled; " in said
    assert Path("samples.png").read_bytes()[:4] == b"\x89PNG"

    assert main(["train", "birds.yaml", *QUICK]) == 0
    results, run_dir = printed(capsys.readouterr().out), Path("runs/birds")
    assert all(math.isfinite(value) for values in results.values() for value in values)

    # The trivial predictor, from the rows: the most frequent class, the median, the share of yes.
    train, val = rows[:NUM_TRAIN], rows[NUM_TRAIN:]
    most = Counter(row["species"] for row in train if row["species"]).most_common(1)[0][0]
    seen = [row["species"] for row in val if row["species"]]
    assert results["species", "accuracy"][0] == pytest.approx(seen.count(most) / len(seen), abs=5e-5)
    ages = [float(row["age"]) for row in val if row["age"]]
    middle = statistics.median(float(row["age"]) for row in train if row["age"])
    assert results["age", "mae"][0] == pytest.approx(statistics.fmean(abs(age - middle) for age in ages), abs=5e-5)
    shares = [statistics.fmean(name in row["marks"] for row in val if row["marks"]) for name in ("barred", "crested")]
    assert results["marks", "map"][0] == pytest.approx(statistics.fmean(shares), abs=5e-5)

    last = read_metrics(run_dir)[-1]
    metrics = {"species/accuracy", "age/mae", "marks/error", "marks/map", "outline/miou", "distance/abs_rel"}
    assert {f"val/{name}" for name in metrics} <= last.keys() and last["val/score"] > 0
    record = json.loads((run_dir / "data.json").read_text())
    assert record["images"] == {"train": NUM_TRAIN, "val": NUM - NUM_TRAIN}
    assert record["classes"] == {"species": [*SPECIES], "marks": ["barred", "crested"]}
    model = read_model(run_dir / "checkpoints/last")
    num_outputs = {task: len(model[f"heads.{task}.out.bias"]) for task, _ in results}
    assert num_outputs == {"species": 3, "age": 1, "marks": 2, "outline": 3, "distance": 1}
    assert json.loads((run_dir / "audit.json").read_text())["ok"]
    report = (run_dir / "report.html").read_text()
    assert '<b class="good">clean</b>' in report and "data:image/png;base64," in report
    assert "plateau: val/marks/map" in report and "train: birds/birds.csv" in report
    assert main(["audit", "runs/birds"]) == 0
