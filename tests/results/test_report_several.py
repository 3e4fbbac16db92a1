"""Several runs on one page: gaps, directions, differences, and where the page goes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from html_checks import Outline
from mtl.cli import main
from run_folders import NASTY, run_content, write_run


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two runs of one task, and one of another."""
    one, two, other = run_content("one"), run_content("two"), run_content("other", "normals")
    two["config.yaml"]["data"]["batch_size"] = 16
    two["config.yaml"]["phases"][1]["lr"] = 0.1
    for row in two["metrics.jsonl"]:
        if "val/score" in row:
            row["val/depth/rmse"] -= 1
            row["val/depth/delta1"] -= 0.05
    other["audit.json"]["ok"] = False
    other["audit.json"]["phases"][1]["completed"] = False
    return [
        write_run(tmp_path / "runs" / name, content) for name, content in (("one", one), ("two", two), ("other", other))
    ]


def compare(runs: list[Path], *options: str) -> int:
    return main(["report", *map(str, runs), *options])


def test_results_are_side_by_side_with_gaps_and_the_best_marked(
    runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(runs) == 0
    page = runs[0].parent / "compare.html"
    assert capsys.readouterr().out.strip() == str(page)
    outline = Outline(page.read_text())
    assert outline.mistakes == []
    lower, higher = "↓lower is better", "↑higher is better"
    assert outline.row("task", "metric")[3:] == ["one", "two", "other"]
    assert outline.row("depth", "rmse") == ["depth", "rmse", lower, "2.0000", "1.0000 (best)", "\u2013"]
    assert outline.row("depth", "delta1") == ["depth", "delta1", higher, "0.8000 (best)", "0.7500", "\u2013"]
    assert outline.row("normals", "rmse") == ["normals", "rmse", lower, "\u2013", "\u2013", "2.0000"]
    assert [text for level, text in outline.headings if level == 2] == [
        *("Results", "Curves", "Differences of configuration", "Audits", "Runs")
    ]


def test_curves_are_overlaid_and_configurations_differ_where_they_do(runs: list[Path]) -> None:
    assert compare(runs) == 0
    page = (runs[0].parent / "compare.html").read_text()
    figures = dict(re.findall(r"<figure><figcaption>([^<]+)</figcaption>(.*?)</figure>", page, re.DOTALL))
    drawn = {title: figure.count("<polyline") for title, figure in figures.items()}
    assert drawn["val/score"] == 3 and drawn["depth/rmse"] == 2 and drawn["normals/rmse"] == 1
    folded = re.search(r"<details>.*</details>", page, re.DOTALL)
    assert folded is not None and "depth/delta1" in folded[0] and "depth/rmse" not in folded[0]
    outline = Outline(page)
    assert outline.row("data.batch_size")[1:] == ["8", "16", "8"]
    assert outline.row("phases.fine.lr")[1:] == ["\u2013", "0.1", "\u2013"]
    assert outline.row("tasks.depth.type")[1:] == ["depth", "depth", "\u2013"]
    assert not [cells for cells in outline.cells if cells and cells[0] in ("name", "trunk.name")]
    assert outline.row("other", "not finished")[3:] == ["52", "0", "0"]


def test_runs_without_a_record_of_directions_mark_nothing(runs: list[Path]) -> None:
    for run in runs:
        (run / "results.json").unlink()
    assert compare(runs) == 0
    outline = Outline((runs[0].parent / "compare.html").read_text())
    assert outline.row("depth", "rmse")[2:] == ["direction not known", "2.0000", "1.0000", "\u2013"]


def test_directories_of_one_name_have_their_paths_as_labels(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = write_run(tmp_path / NASTY / "one", run_content("one"))
    monkeypatch.chdir(tmp_path)
    assert compare([runs[0], again]) == 0
    page = (tmp_path / "runs/compare.html").read_text()
    assert Outline(page).row("task", "metric")[3:] == ["runs/one", f"{NASTY}/one"]
    assert "a<b>" not in page


def test_a_page_that_is_there_is_not_overwritten_unless_asked(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    page.write_text("mine")
    assert compare(runs, "--out", str(page)) == 2
    assert capsys.readouterr().err == f"error: {page} exists; --force overwrites it, --out FILE writes somewhere else\n"
    assert page.read_text() == "mine"
    assert compare(runs, "--out", str(page), "--force") == 0
    assert "3 runs compared" in page.read_text()
    assert not (runs[0].parent / "compare.html").exists()
    assert compare(runs) == 0 and compare(runs) == 2


REFUSED = {
    "the same twice": (["one", "one"], [], "runs/one is given twice; expected runs that differ"),
    "no run": (
        ["one", "nowhere"],
        [],
        "runs/nowhere is not a finished run: it lacks config.yaml, metrics.jsonl",
    ),
    "a picture": (["one", "two"], ["--picture", "a.png"], "--picture: expected one run; several have no picture"),
    "no page": (["one", "two"], ["--out", "a.txt"], "--out: expected a name that ends in .html, got a.txt"),
    "no folder": (["one", "two"], ["--out", "gone/a.html"], "gone/.a.html.tmp cannot be written: No such file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_compared_is_refused_in_one_line_and_nothing_is_written(
    runs: list[Path], tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names, options, expected = REFUSED[case]
    before = sorted(tmp_path.rglob("*"))
    assert main(["report", *(f"runs/{name}" for name in names), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {expected}")
    assert sorted(tmp_path.rglob("*")) == before
    assert runs[0].is_dir()


def test_a_comparison_needs_no_torch(runs: list[Path]) -> None:
    program = "import sys; from mtl.cli import main; sys.exit(main(sys.argv[1:]) or 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program, "report", *map(str, runs)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_damaged_run_is_named_with_its_file(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    (runs[1] / "metrics.jsonl").write_text("oops\n")
    assert compare(runs) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {runs[1]}/metrics.jsonl:1: expected one row as JSON")


def test_a_key_that_is_written_twice_is_refused_by_both_reports_in_the_same_words(
    runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = runs[1] / "config.yaml"
    file.write_text(f"{file.read_text()}name: again\n")
    expected = f"{file}:{len(file.read_text().splitlines())}: name: this key is given twice"
    for given in (runs, runs[1:2]):
        assert compare(given) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert expected in line
