"""What is printed in terminals of some widths fits them; errors are coloured."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from mtl.runtime.layout import columns_of
from runs import TINY, tiny_config
from terminal import lines_of, run_in_terminal

RED, END = "\x1b[31m", "\x1b[0m"


def too_long(said: str, columns: int) -> list[str]:
    """The lines that are wider than a terminal, but for a single word such as a path."""
    return [line for line in lines_of(said) if columns_of(line) > columns and " " in line.strip()]


@pytest.mark.slow
def test_tables_epoch_lines_and_bars_of_a_run_fit_80_columns(tmp_path: Path) -> None:
    code, said = run_in_terminal(80, "train", str(tiny_config(tmp_path)))
    assert code == 0, said
    lines = lines_of(said)
    assert not too_long(said, 80)
    first = next(place for place, line in enumerate(lines) if line.startswith("warm-heads  epoch 1 "))
    epoch = [lines[first], *lines[first + 1 : first + 3]]
    assert all(line.startswith("    ") for line in epoch[1:])
    fields = [field for line in epoch for field in line.strip().split("  ")]
    assert [field.rpartition(" ")[0] for field in fields if field[-1].isdigit()] == [
        *("epoch", "step", "loss", "val/score"),
        *("segmentation miou", "depth abs_rel", "normals mean", "object accuracy"),
    ]
    assert fields[-1].endswith(" img/s")
    table = next(place for place, line in enumerate(lines) if line.startswith("task "))
    assert [line.split()[:2] for line in lines[table + 2 : table + 6]] == [
        *(["segmentation", "miou"], ["depth", "abs_rel"], ["normals", "mean"], ["object", "accuracy"])
    ]
    assert any(line.startswith("warm-heads epoch 1   0%") for line in lines), "the bar"
    assert "\x1b[3" not in said, "nothing is wrong, so nothing is coloured"


@pytest.mark.slow
def test_what_every_verb_prints_for_a_reader_fits_40_columns_and_names_of_28_letters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    task = {"semantic_segmentation_of_room": TINY["tasks"]["segmentation"] | {"label": "segmentation"}}
    phase = TINY["phases"][0] | {"name": "heads-on-a-trunk-that-froze"}
    tiny_config(Path(), tasks=task, phases=[phase], runs_dir="runs")
    Image.new("RGB", (40, 40)).save("a.png")
    for arguments in (
        "train tiny.yaml",
        "eval runs/tiny",
        "audit runs/tiny",
        "export runs/tiny --format timm --out out",
        "predict runs/tiny a.png --out predicted --to-labels",
        "data check tiny.yaml",
        "plan tiny.yaml",
    ):
        code, said = run_in_terminal(40, *arguments.split())
        assert code == 0, said
        assert not too_long(said, 40), arguments


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["--params"]])
def test_a_plan_fits_80_columns_and_is_the_same_in_words(tmp_path: Path, arguments: list[str]) -> None:
    file = str(tiny_config(tmp_path))
    code, said = run_in_terminal(80, "plan", file, *arguments)
    wide_code, wide = run_in_terminal(500, "plan", file, *arguments)
    assert code == wide_code == 0, said
    assert max(map(len, lines_of(said))) <= 80
    if not arguments:
        assert max(map(len, lines_of(wide))) > 80
        assert said.split() == wide.split()


@pytest.mark.parametrize(
    ("environment", "prefix"),
    [({}, f"{RED}error:{END}"), ({"NO_COLOR": "1"}, "error:"), ({"TERM": "dumb"}, "error:")],
)
def test_an_error_is_red_unless_colours_are_not_wanted(
    tmp_path: Path, environment: dict[str, str], prefix: str
) -> None:
    code, said = run_in_terminal(300, "train", str(tmp_path / "x.yaml"), **environment)
    assert code == 2
    assert said == f"{prefix} {tmp_path}/x.yaml: no such file\n"


def test_arguments_that_are_wrong_are_red_too() -> None:
    code, said = run_in_terminal(80, "report")
    assert code == 2
    assert said.splitlines()[-1].startswith(f"{RED}mtl report: error:{END} the following arguments are required")
