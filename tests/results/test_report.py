"""The report of a real run: one page, whose numbers are those of the run's files."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from html_checks import Outline
from mtl.cli import main
from mtl.results.pictures import add_legend
from mtl.results.report.picture import draw_run
from mtl.results.report.predictions import PictureRow, picture_cells
from mtl.results.report.write import write_report
from mtl.tasks import Task
from mtl.tasks.segmentation import Segmentation
from mtl.training.run import train
from runs import read_metrics, read_model, tiny_parts

GARMENTS = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
SECTIONS = [
    *("Results", "Phases", "Freeze map", "Curves", "Dividend", "Audit", "Gradient conflicts", "Predictions"),
    *("Origin", "Configuration"),
]


def content_of(run_dir: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run_dir / name).read_text())
    return content


@pytest.fixture(scope="module")
def page(finished: Path) -> str:
    return (finished / "report.html").read_text()


@pytest.fixture(scope="module")
def outline(page: str) -> Outline:
    return Outline(page)


def test_the_page_is_whole_and_what_came_out_is_first(page: str, outline: Outline) -> None:
    assert outline.mistakes == []
    assert [text for level, text in outline.headings if level == 2] == SECTIONS
    assert 'Audit: <b class="good">clean</b>' in page
    assert len(page.encode()) < 2_000_000
    assert not re.search(r"<(script|iframe|object)|url\(|@import|onload", page), "nothing runs, and nothing is loaded"


def test_the_table_of_results_has_the_numbers_of_the_run(finished: Path, outline: Outline) -> None:
    results, rows = content_of(finished, "results.json"), read_metrics(finished)
    validated = [row for row in rows if "val/score" in row]
    best = max(validated, key=lambda row: row["val/score"])
    arrows = {"higher": "↑higher is better", "lower": "↓lower is better"}
    for task, metrics in results["trivial"].items():
        for metric, trivial in metrics.items():
            key = f"val/{task}/{metric}"
            ends = [[row for row in validated if row["phase"] == name][-1][key] for name in ("warm-heads", "finetune")]
            values = [trivial, *ends, best[key]]
            direction = results["tasks"][task]["directions"][metric]
            wanted = max(values) if direction == "higher" else min(values)
            expected = [f"{value:.4f}{' (best)' if value == wanted else ''}" for value in values]
            assert outline.row(task, metric) == [task, metric, arrows[direction], *expected]


def test_phases_have_their_reasons_patterns_and_steps(finished: Path, outline: Outline) -> None:
    ends = content_of(finished, "results.json")["phases"]
    assert [end["reason"] for end in ends] == ["1 epoch done", "7 steps done"]
    first, second = outline.row("1", "warm-heads"), outline.row("2", "finetune")
    assert first[2:4] + first[5:] == ["1 to 5", "1", "trunk", "1 epoch done"]
    assert second[2:4] + second[5:] == ["6 to 12", "2", "trunk.conv1, trunk.bn1, heads.object", "7 steps done"]


def test_the_freeze_map_agrees_with_what_moved_between_the_ends_of_phases(finished: Path, outline: Outline) -> None:
    before = read_model(next((finished / "checkpoints").glob("step-00000005")))
    after = read_model(finished / "checkpoints/last")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    for part in ("heads.object", "heads.depth", "heads.normals", "heads.segmentation"):
        is_still = not any(name.startswith(f"{part}.") for name in moved)
        assert outline.row(part)[1:] == ["trained", "frozen" if is_still else "trained"]
    stem = next(cells for cells in outline.cells if cells and cells[0].startswith("00 "))
    assert stem[1] == "frozen"


def test_frozen_tensors_and_the_command_that_proves_them_again_are_shown(finished: Path, page: str) -> None:
    num_frozen = sum(name.startswith("trunk.") for name in read_model(finished / "checkpoints/best"))
    assert f'<th scope="row">warm-heads</th><td><b class="good">yes</b></td><td class="num">{num_frozen}' in page
    assert f"<pre>mtl audit {finished}</pre>" in page


def test_the_conflict_map_spreads_over_every_analysis(finished: Path, outline: Outline) -> None:
    rows = [row for row in read_metrics(finished) if "grad/unreached" in row]
    assert [row["step"] for row in rows] == [6, 8, 10, 12]
    assert (3, "finetune: 4 analyses, step 6 to 12") in outline.headings
    cosines = [row["grad/cosine/segmentation/depth"] for row in rows]
    cell = next(cells for cells in outline.cells if cells[:2] == ["segmentation", "the same task"])[2]
    numbers = [float(each) for each in re.findall(r"-?\d+\.\d\d", cell)]
    expected = [median(cosines), min(cosines), max(cosines)]
    assert numbers == [pytest.approx(value, abs=0.0051) for value in expected]


def test_machine_versions_command_and_configuration_are_shown(finished: Path, page: str) -> None:
    (session,) = content_of(finished, "results.json")["sessions"]
    assert f"torch {session['versions']['torch']}" in page
    assert f"<dt>Cores</dt><dd>{session['machine']['cores']}</dd>" in page
    assert re.search(
        r"Command</h3><pre>mtl train \S+tiny.yaml audit.gradients_every_steps=2 checkpoint.keep_every_epochs=1</pre>",
        page,
    )
    assert "name: test_resnet" in page


def test_predictions_have_pictures_with_texts_legends_and_a_scale_in_metres(page: str, tmp_path: Path) -> None:
    alts = re.findall(r'<img src="data:image/(png|jpeg);base64,[^"]+" alt="([^"]+)"', page)
    assert len(alts) == 6 * (1 + 2 * 3)
    assert {text for kind, text in alts if kind == "jpeg"} == {f"image, example {place}" for place in range(1, 7)}
    assert ("png", "depth, predicted, example 6") in alts
    keys = re.search(r"segmentation: classes</h3><ul class=\"keys\">(.*?)</ul>", page)
    assert keys is not None
    assert re.findall(r"</i>([^<]+)</li>", keys[1]) == ["floor", "wall", "sphere", *GARMENTS]
    scale = re.search(r'depth: scale</h3><div class="gradient">([^<]+)<i style="([^"]+)".*?</i>([^<]+)</div>', page)
    assert scale is not None and (scale[1], scale[3]) == ("0 m", "8 m")
    # The bar has the colours of the pictures: both ends are those of a depth that is there.
    setup = tiny_parts(tmp_path)
    ends = setup.tasks["depth"].draw(torch.tensor([1e-9, 8.0]).view(1, 1, 1, 2), is_label=True)[0, 0]
    colours = ["#" + "".join(f"{round(255 * float(part)):02x}" for part in end) for end in ends]
    assert scale[2].startswith(f"background:linear-gradient(to right,{colours[0]},")
    assert scale[2].endswith(f",{colours[1]})")
    truth = [GARMENTS[label] for label in setup.val.labels["object"][:6].tolist()]
    assert Outline(page).row("object, truth")[1:] == truth


def test_many_large_pictures_are_made_small_enough() -> None:
    # Noise is the worst that can be asked of an encoder.
    noise = np.random.default_rng(0).integers(0, 256, (6, 500, 400, 3), dtype=np.uint8)
    rows = [PictureRow(f"row {place}", noise, place > 0, "noise") for place in range(5)]
    cells = picture_cells(rows)
    files = re.findall(r"base64,([^\"]+)", "".join(cell for row in cells for cell in row))
    assert len(files) == 5 * 6 and 100_000 < sum(map(len, files)) < 1_200_001
    sizes = {Image.open(io.BytesIO(base64.b64decode(file))).size for file in files}
    ((width, height),) = sizes
    assert height < 200 and width / height == pytest.approx(0.8, abs=0.02)


def test_the_command_writes_the_page_again_and_a_picture(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "picture.png"
    assert main(["report", str(run_dir), "--picture", str(picture)]) == 0
    assert capsys.readouterr().out.strip() == str(run_dir / "report.html")
    assert Image.open(io.BytesIO(picture.read_bytes())).size[0] > 1000


def test_a_run_of_an_earlier_version_is_shown_and_what_it_did_not_record_is_said(run_dir: Path) -> None:
    results = content_of(run_dir, "results.json")
    (run_dir / "results.json").unlink()
    plan = content_of(run_dir, "plan.json")
    for phase in plan["phases"]:
        del phase["parts"]
    (run_dir / "plan.json").write_text(json.dumps(plan))
    assert main(["report", str(run_dir)]) == 0
    page = (run_dir / "report.html").read_text()
    outline = Outline(page)
    assert outline.mistakes == []
    assert outline.row("1", "warm-heads")[-1] == "not recorded by this run"
    assert "This run did not record what its kept features saved" in page
    # The trivial predictor follows from the configuration, and the freeze map from the plan.
    assert outline.row("depth", "rmse")[3] == f"{results['trivial']['depth']['rmse']:.4f}"
    assert outline.row("heads.object")[1:] == ["trained", "frozen"]


def test_a_page_elsewhere_is_not_overwritten_unless_asked(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    out.write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    assert main(["report", str(run_dir), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert said == f"error: {out} exists; --force overwrites it, --out FILE writes somewhere else\n"
    assert out.read_text() == "mine"
    assert main(["report", str(run_dir), "--out", str(out), "--force"]) == 0
    assert Outline(out.read_text()).mistakes == []
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


@pytest.mark.parametrize("lacking", ["config.yaml", "audit.json", "checkpoints"])
def test_a_folder_that_is_no_finished_run_is_refused(
    run_dir: Path, lacking: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_dir / lacking
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    assert main(["report", str(run_dir)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {run_dir} is not a finished run: it lacks {lacking}")


@pytest.mark.slow
def test_violations_of_a_real_run_are_listed(tmp_path: Path) -> None:
    parts = tiny_parts(tmp_path, "audit.policy=collect")
    stem = parts.model.trunk.get_parameter("conv1.0.weight")

    def write(*_: object) -> None:
        stem.data.mul_(1.001)

    handle = parts.model.heads["depth"].register_forward_hook(write)
    result = train(parts, quiet=True)
    handle.remove()
    page = write_report(parts, result.run_dir).read_text()
    assert 'Audit: <b class="bad">violations</b>' in page
    assert "<code>trunk.conv1.0.weight</code>: <b>param_changed</b>: its bytes differ" in page
    assert Outline(page).mistakes == []


# --- the picture for `--picture`, and legends of pictures


def test_the_picture_names_the_classes_of_maps_below_and_of_images_above(tmp_path: Path) -> None:
    setup = tiny_parts(tmp_path)
    figure = draw_run(setup, [])
    below = figure.subfigs[1]
    (legend,) = below.legends
    assert [text.get_text() for text in legend.get_texts()] == ["floor", "wall", "sphere", *GARMENTS]
    drawn = setup.tasks["segmentation"].draw(torch.arange(13).view(1, 1, 13), is_label=True)[0, 0]
    patches = [patch for patch in legend.legend_handles if isinstance(patch, Patch)]
    assert [to_rgb(patch.get_facecolor()) for patch in patches] == [pytest.approx(colour) for colour in drawn.tolist()]
    truths = [GARMENTS[label] for label in setup.val.labels["object"][:6].tolist()]
    titles = [axes.get_title() for axes in below.axes[:6]]
    assert [re.fullmatch(r"object: ([\w -]+)[ \n]\(truth ([\w -]+)\)", title)[2] for title in titles] == truths  # type: ignore[index]
    figure.draw_without_rendering()
    boxes = [axes.title.get_window_extent() for axes in below.axes[:6]]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes)), "titles do not run into each other"
    assert legend.get_window_extent().y1 < min(axes.get_window_extent().y0 for axes in below.axes)


def test_a_legend_says_whose_classes_they_are_where_several_tasks_have_names() -> None:
    parts = Segmentation(2, class_names=["head", "leg"])
    figure = Figure(layout="constrained")
    add_legend(figure, {"parts": parts, "rooms": Segmentation(2, class_names=["wall", "door"])}, 6.4)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        *("parts: head", "parts: leg", "rooms: wall", "rooms: door")
    ]
    nameless: dict[str, Task] = {"parts": Segmentation(2)}
    figure = Figure(layout="constrained")
    add_legend(figure, nameless, 6.4)
    assert not figure.legends
