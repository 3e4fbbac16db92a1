"""The report: one self-contained page with the audit's verdict, a picture, and the configuration."""

from __future__ import annotations

import base64
import io
import re
import shutil
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from mtl.cli import main
from mtl.results.pictures import add_legend
from mtl.results.report import draw_run, gradients_html, write_report
from mtl.tasks import Task
from mtl.tasks.segmentation import Segmentation
from mtl.training.run import train
from runs import read_model, tiny_parts


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    """The folder of a run that has ended."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTL_CACHE_DIR", str(cache_dir))
        train(tiny_parts(folder), quiet=True)
    return folder


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    """The directory of a copy of it."""
    shutil.copytree(finished / "runs", tmp_path / "runs", symlinks=True)
    return tmp_path / "runs/tiny"


def test_the_report_shows_verdict_phases_picture_and_configuration(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "picture.png"
    assert main(["report", str(run_dir), "--picture", str(picture)]) == 0
    assert capsys.readouterr().out.strip() == str(run_dir / "report.html")
    page = (run_dir / "report.html").read_text()
    assert 'Audit: <b class="ok">clean</b>' in page
    num_frozen = sum(name.startswith("trunk.") for name in read_model(run_dir / "checkpoints/best"))
    assert f"<td>warm-heads<td>trunk<td>{num_frozen}<td>" in page
    assert "<td>finetune<td>trunk.conv1, trunk.bn1, heads.object<td>" in page
    assert "name: test_resnet" in page
    assert re.search(r"<h2>Command</h2><pre>mtl train \S+tiny.yaml</pre><h2>Configuration</h2>", page)
    assert "http" not in page, "nothing is loaded from elsewhere"
    assert "<h3>finetune, step 6</h3>" in page and "arXiv 2001.06782" in page
    assert "<h3>warm-heads" not in page, "of a frozen trunk there is nothing to say"
    assert page.count('alt="gradients of finetune, step 6"') == 1
    pairs = re.findall(r"<tr><td>(\w+)<td>(\w+)<td>(-?[\d.]+)<td>[\d.]+<td>(yes|no)</tr>", page)
    assert [pair[:2] for pair in pairs] == [*combinations(("segmentation", "depth", "normals", "object"), 2)]
    assert all((float(cosine) < 0) == (conflict == "yes") for *_, cosine, conflict in pairs)
    embedded = base64.b64decode(re.search(r"base64,([^\"]+)", page)[1])  # type: ignore[index]
    assert embedded == picture.read_bytes()
    image = Image.open(io.BytesIO(embedded))
    assert image.size[0] > 1000 and len(image.convert("L").histogram()) == 256


GARMENTS = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]


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


@pytest.mark.slow
def test_violations_are_listed_and_names_are_escaped(tmp_path: Path) -> None:
    parts = tiny_parts(tmp_path, "audit.policy=collect")
    stem = parts.model.trunk.get_parameter("conv1.0.weight")

    def write(*_: object) -> None:
        stem.data.mul_(1.001)

    handle = parts.model.heads["depth"].register_forward_hook(write)
    outcome = train(parts, quiet=True)
    handle.remove()
    outcome.report.phases[0].name = "<b>"
    page = write_report(parts, outcome.run_dir).read_text()
    assert 'Audit: <b class="broken">violations</b>' in page
    assert "<code>trunk.conv1.0.weight</code> param_changed: its bytes differ" in page


def test_without_gradient_analysis_there_is_no_such_section() -> None:
    assert gradients_html([]) == ""


def test_the_last_analysis_of_each_phase_is_shown_with_what_no_task_reaches() -> None:
    row = {"grad/norm/a": 1.0, "grad/norm/a/00 w": 1.0, "grad/unreached": 2}
    page = gradients_html([{"phase": phase, "step": step, **row} for phase, step in [("<p>", 1), ("<p>", 4), ("q", 5)]])
    assert re.findall("<h3>(.*?)</h3>", page) == ["&lt;p&gt;, step 4", "q, step 5"]
    assert page.count("No task reaches 2 trainable depth groups.") == 2
    assert "<table>" not in page, "one task has no pairs"


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
