"""`mtl bench`: its loops do the same work, and its table says what was measured."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mtl.cli import main
from mtl.freeze import enforce
from mtl.results.bench import Row, draw, in_words, to_json
from mtl.results.bench.loops import limit_loop, naive_loop
from mtl.results.bench.memory import peak_growth
from mtl.training.setup import assemble

bench = importlib.import_module("mtl.results.bench.bench")
SMALL = bench.Setting("test_resnet", 32, 8, 16, dense=True)


@pytest.mark.parametrize("phase", ["trunk_frozen", "half_frozen", "head_frozen", "nothing_frozen"])
def test_a_row_holds_times_and_memory_of_all_three_loops(phase: str, tmp_path: Path) -> None:
    row = bench._measure(SMALL, phase, tmp_path, rounds=1)
    assert (row.setting, row.phase) == ("test_resnet, 32 px, batch 8, dense heads", phase)
    assert row.num_images == (64 if phase == "trunk_frozen" else 16)
    assert min(row.naive_s, row.mtl_s, row.limit_s, row.first_epoch_s) > 0
    assert 0 < row.audit_share < 1
    assert row.peak_bytes.keys() == {"naive", "mtl", "limit"}
    assert row.gain == pytest.approx(row.naive_s / row.mtl_s)


@pytest.mark.parametrize("phase", ["trunk_frozen", "half_frozen"])
def test_what_is_extracted_by_hand_trains_to_the_weights_of_the_naive_loop(
    phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An epoch of heads alone would have four times as many images.
    small = replace(SMALL, num_images=SMALL.num_images // 4) if phase == "trunk_frozen" else SMALL
    parts = assemble(small.config(tmp_path, phase), quiet=True)
    enforce(parts.root, parts.phases[0].freeze.plan)
    models = []
    loops = importlib.import_module("mtl.results.bench.loops")
    copy = loops.copy.deepcopy

    def and_keep(thing: object, memo: dict[int, object] | None = None) -> object:
        made = copy(thing, memo)
        models.append(made)
        return made

    monkeypatch.setattr(loops.copy, "deepcopy", and_keep)
    for make in (naive_loop, limit_loop):
        epoch = make(parts)
        epoch()
        epoch()
    one, other = (model for model in models if type(model) is type(parts.model))
    assert one is not other
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        # By hand, features are extracted in larger batches, in which a kernel may add up in another order.
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), parts.model.parameters(), strict=True))


def test_peak_growth_sees_what_was_there_for_a_moment() -> None:
    with peak_growth(torch.device("cpu")) as found:
        torch.ones(30_000_000).sum()
    assert found[0] == pytest.approx(120e6, rel=0.2)


ROWS = [
    Row("a trunk", "trunk_frozen", 64, 3.0, 0.5, 0.25, 1.0, 0.125, {"naive": 3_000_000, "mtl": 2000, "limit": 5}),
    Row("a trunk", "nothing_frozen", 64, 4.0, 4.0, 4.0, 4.5, 0.01, {"naive": 3_000_000, "mtl": 2000, "limit": 5}),
]


def test_a_table_that_is_wider_than_the_terminal_becomes_one_a_setting() -> None:
    two = [*ROWS, replace(ROWS[0], setting="another trunk, 64 px, batch 32, dense heads")]
    text = in_words(two, 80)
    assert max(map(len, text.splitlines())) <= 80
    assert [block.splitlines()[0] for block in text.split("\n\n")] == ["a trunk", two[2].setting]
    assert text.split("\n\n")[0].splitlines()[1:] == [
        "               trunk_frozen  nothing_frozen",
        "-------------  ------------  --------------",
        "naive               3.000 s         4.000 s",
        "mtl                 0.500 s         4.000 s",
        "limit               0.250 s         4.000 s",
        "naive/mtl              6.00            1.00",
        "mtl/limit              2.00            1.00",
        "1st epoch           1.000 s         4.500 s",
        "audit                 12.5%            1.0%",
        "memory, naive          3 MB            3 MB",
        "memory, mtl            2 kB            2 kB",
        "memory, limit           5 B             5 B",
    ]
    assert in_words(two, 200) == in_words(two)


def test_the_table_the_data_and_the_picture_hold_the_same_numbers(tmp_path: Path) -> None:
    line = in_words(ROWS).splitlines()[2].split("  ")
    cells = [cell.strip() for cell in line if cell.strip()]
    assert cells == [
        *("a trunk", "trunk_frozen", "3.000 s", "0.500 s", "0.250 s", "6.00", "2.00", "1.000 s", "12.5%"),
        "3 MB / 2 kB / 5 B",
    ]
    first = to_json(ROWS)["rows"][0]
    assert first.items() >= {"setting": "a trunk", "phase": "trunk_frozen", "naive_s": 3.0, "mtl_s": 0.5}.items()
    assert first["peak_bytes"] == {"naive": 3_000_000, "mtl": 2000, "limit": 5}
    draw(ROWS).savefig(tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 1000


@pytest.mark.parametrize("file", ["bench.txt", "nowhere/bench.png"])
def test_a_plot_that_cannot_be_is_refused_before_anything_is_measured(
    file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--quick", "--plot", file]) == 2
    assert "--plot: expected a .png, .pdf or .svg in a folder that is there" in capsys.readouterr().err
