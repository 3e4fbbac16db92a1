"""`mtl bench`: its loops do the same work, and its tables say what was measured."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import mtl.results.bench.measure as measure_module
from mtl.cli import main
from mtl.results.bench import Bench, BenchRow, draw, in_words
from mtl.results.bench.loops import ByHand, OnExtracted, limit_loop, mtl_loop, naive_loop
from mtl.results.bench.measure import BY_HAND, Lap, LoopTimes, measure
from mtl.results.bench.memory import peak_growth
from mtl.results.bench.peers import LikeLibMtl, peers_here
from mtl.results.bench.settings import Setting
from mtl.training.setup import RunSetup, assemble

SMALL = Setting("test_resnet", 32, 8, 2, dense=True)
PHASES = ["trunk_frozen", "half_frozen", "head_frozen", "nothing_frozen"]


def test_a_row_holds_times_and_memory_of_all_loops(tmp_path: Path) -> None:
    peers, missing = peers_here()
    assert not missing
    row = measure(SMALL, "half_frozen", tmp_path, 2, {**BY_HAND, **peers}, epochs=2)
    assert (row.setting, row.phase) == ("test_resnet, 32 px, batch 8, dense heads", "half_frozen")
    assert (row.num_steps, row.num_images, row.num_val) == (2, 16, 32)
    assert list(row.loops) == ["naive", "mtl", "limit", "libmtl", "lightning"]
    for times in row.loops.values():
        assert len(times.laps) == 2
        assert all(0 < lap.train_s < lap.epoch_s and 0 < lap.train_cpu_s <= lap.epoch_cpu_s for lap in times.laps)
    assert 0 < row.audit_share < 1


def test_a_lap_is_the_mean_of_its_epochs_and_ends_when_all_is_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    now, waited = [0.0], []

    def loop(trained: Callable[[], None]) -> None:
        now[0] += 3
        trained()
        now[0] += 1

    def wait() -> None:
        waited.append(now[0])
        now[0] += 6

    clock = SimpleNamespace(perf_counter=lambda: now[0], process_time=lambda: now[0] / 2)
    monkeypatch.setattr("mtl.results.bench.measure.time", clock)
    lap = measure_module._lap(loop, torch.device("cpu"), 2, wait)
    assert lap == Lap(train_s=3, epoch_s=7, train_cpu_s=1.5, epoch_cpu_s=3.5)
    assert waited == [8]


def test_mtl_runs_as_a_user_gets_it(tmp_path: Path) -> None:
    setup = assemble(SMALL.config(tmp_path, "trunk_frozen"), quiet=True)
    seen = []
    with mtl_loop(setup) as mtl:
        for _ in range(2):
            mtl.epoch(lambda: seen.append((setup.config.run_dir / "checkpoints/last").exists()))
        assert mtl.message == ""
        # Steps 1 to 3, 20 and 40 have two checks each, the phase's begin and both epochs one more.
        assert len(mtl.audit_s) == 2 * 5 + 4
    # The mark is set before the first checkpoint, and the second one comes after that.
    assert seen == [False, True]
    run_dir = setup.config.run_dir
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "val/score" in row] == [20, 40]
    assert len([row for row in rows if "train/loss" in row]) == 40
    assert list((run_dir / "wandb").glob("offline-run-*/*.wandb"))
    assert json.loads((run_dir / "checkpoints/last/state.json").read_text())["step"] == 40


@pytest.mark.parametrize("phase", PHASES)
def test_all_loops_by_hand_and_of_peers_train_to_the_weights_of_the_naive_one(
    phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = assemble(SMALL.config(tmp_path, phase), quiet=True)
    models = copies(monkeypatch)
    with ExitStack() as stack:
        loops = [naive_loop(setup, tmp_path), limit_loop(setup, tmp_path)]
        loops += [peer(setup, tmp_path, stack) for peer in peers_here()[0].values()]
        for loop in loops:
            for _ in range(1 if phase == "trunk_frozen" else 2):
                loop(lambda: None)
    assert len(models) == len(loops) == 4
    for other in models[1:]:
        for (name, a), b in zip(models[0].state_dict().items(), other.state_dict().values(), strict=True):
            # What is extracted comes from larger batches, in which a kernel may add up in another order.
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    moved = {name for name, p in models[0].named_parameters() if not torch.equal(p, setup.root.get_parameter(name))}
    assert "heads.segmentation.lateral.0.weight" in moved
    assert moved <= set(setup.phases[0].freeze.plan.names.trainable)


def copies(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models of the loops, in the order in which they are made.

    They are trained by SGD: AdamW divides by the gradient, so where that is close to 0, rounding decides.
    """
    models: list[nn.Module] = []
    init = ByHand.__init__

    def and_keep(self: ByHand, setup: RunSetup) -> None:
        init(self, setup)
        # Equal weighting sums the losses, the others take their mean.
        lr = 0.02 / (len(setup.tasks) if isinstance(self, LikeLibMtl) else 1)
        self.optimizer = SGD([p for p in self.model.parameters() if p.requires_grad], lr=lr)
        models.append(self.model)

    monkeypatch.setattr(ByHand, "__init__", and_keep)
    return models


@pytest.mark.parametrize("phase", ["trunk_frozen", "half_frozen"])
def test_the_limit_validates_what_it_extracted_to_the_metrics_of_the_naive_loop(phase: str, tmp_path: Path) -> None:
    setup = assemble(SMALL.config(tmp_path, phase), quiet=True)
    naive, limit = ByHand(setup), OnExtracted(setup)
    assert len(list(limit.val())) == (1 if phase == "trunk_frozen" else 4)
    for task, metrics in naive.validate().items():
        assert limit.validate()[task] == pytest.approx(metrics, rel=1e-4), task


@pytest.mark.parametrize("phase", ["trunk_frozen", "nothing_frozen"])
def test_the_naive_loop_saves_the_model_and_the_limit_what_trains(phase: str, tmp_path: Path) -> None:
    setup = assemble(SMALL.config(tmp_path, phase), quiet=True)
    saved = []
    for make in (naive_loop, limit_loop):
        make(setup, tmp_path)(lambda: None)
        (file,) = tmp_path.glob("*.pt")
        saved.append(torch.load(file))
        file.unlink()
    trainable = set(setup.phases[0].freeze.plan.names.trainable)
    assert set(saved[0]["model"]) == set(setup.root.state_dict())
    assert set(saved[1]["model"]) == trainable
    for content in saved:
        assert len(content["optimizer"]["state"]) == len(trainable)


def test_a_peer_that_fails_says_so_where_its_epoch_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = assemble(SMALL.config(tmp_path, "nothing_frozen"), quiet=True)
    lightning_peer = importlib.import_module("mtl.results.bench.lightning_peer")

    def fail(*_: Any) -> Tensor:
        raise RuntimeError("no such step")

    monkeypatch.setattr(lightning_peer._Module, "training_step", fail)
    with lightning_peer.LightningLoop(setup, tmp_path) as loop, pytest.raises(RuntimeError, match="no such step"):
        loop(lambda: None)


def test_peers_that_are_not_installed_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = importlib.import_module("mtl.results.bench.peers")
    monkeypatch.setattr(peers, "find_spec", lambda name: None if name == "finetuning_scheduler" else name)
    there, missing = peers_here()
    assert list(there) == ["libmtl"]
    assert missing == [
        "lightning: not measured, finetuning-scheduler not installed (pip install 'mtl-freeze[peers]')",
    ]


def test_peak_growth_sees_what_was_there_for_a_moment() -> None:
    with peak_growth(torch.device("cpu")) as found:
        torch.ones(30_000_000).sum()
    assert found[0] == pytest.approx(120e6, rel=0.2)


def times(train: float, epoch: float, *, first: float = 1.0, peak: int = 0) -> LoopTimes:
    """Three rounds, the middle one as given; processors take twice as long."""
    laps = [Lap(train * by, epoch * by, 2 * train, 2 * epoch) for by in (0.5, 1, 4)]
    return LoopTimes(first, peak, laps)


LOOPS = {
    "naive": times(3.0, 4.0, first=3.5, peak=3_000_000),
    "mtl": times(0.5, 0.75, first=4.5, peak=2000),
    "limit": times(0.25, 0.5, first=2.5, peak=5),
}
ROWS = [
    BenchRow("a trunk", "trunk_frozen", 20, 1280, 256, 0.125, "", LOOPS),
    BenchRow("a trunk", "nothing_frozen", 4, 256, 256, 0.01, "", LOOPS | {"mtl": times(0.25, 1.5)}),
]
MACHINE = {
    "system": "Linux",
    "processor": "A processor",
    "cores": 2,
    "memory_bytes": 1,
    "threads": 1,
    "gpu": None,
    "versions": {"torch": "2.14.1"},
    "folder": "/tmp",
}
FOUND = Bench(MACHINE, ROWS)


def test_the_tables_name_the_machine_and_fit_a_terminal() -> None:
    two = replace(FOUND, rows=[*ROWS, replace(ROWS[0], setting="another trunk, 64 px, batch 32, dense heads")])
    text = in_words(two, 80)
    assert max(map(len, text.splitlines())) <= 80
    blocks = text.split("\n\n")
    assert blocks[0].splitlines() == [
        "A processor, 2 cores, 1 threads",
        "torch 2.14.1",
        "runs in /tmp; medians of an epoch's seconds",
    ]
    assert [block.splitlines()[0] for block in blocks[1:]] == ["a trunk", two.rows[2].setting]
    assert blocks[1].splitlines()[1:] == [
        "                       trunk_frozen  nothing_frozen",
        "---------------------  ------------  --------------",
        "steps                            20               4",
        "train, naive                3.000 s         3.000 s",
        "train, mtl                  0.500 s         0.250 s",
        "train, limit                0.250 s         0.250 s",
        "train, naive/limit            12.00           12.00",
        "train, mtl/limit               2.00            1.00",
        "train, mtl/limit, CPU          2.00            1.00",
        "epoch, naive                4.000 s         4.000 s",
        "epoch, mtl                  0.750 s         1.500 s",
        "epoch, limit                0.500 s         0.500 s",
        "epoch, naive/limit             8.00            8.00",
        "epoch, mtl/limit               1.50            3.00",
        "epoch, mtl/limit, CPU          1.50            3.00",
        "first, naive                3.500 s         3.500 s",
        "first, mtl                  4.500 s         1.000 s",
        "first, limit                2.500 s         2.500 s",
        "audit                         12.5%            1.0%",
        "memory, naive                  3 MB            3 MB",
        "memory, mtl                    2 kB             0 B",
        "memory, limit                   5 B             5 B",
    ]
    assert in_words(two, None) == text


def test_what_was_not_measured_stands_below_the_tables() -> None:
    lines = ["lightning: not measured", "wandb: off, since it failed"]
    rows = [replace(row, tracking=lines[1]) for row in ROWS]
    assert in_words(replace(FOUND, rows=rows, missing=lines[:1])).split("\n\n")[-1].splitlines() == lines


def test_ratios_are_of_the_same_round() -> None:
    # By the medians alone, 3 / 2 = 1.5.
    one = LoopTimes(0, 0, [Lap(each, each, each, each) for each in (1.0, 3.0, 4.0)])
    other = LoopTimes(0, 0, [Lap(each, each, each, each) for each in (1.0, 3.0, 2.0)])
    assert one.median("train_s") == 3.0
    assert other.median("train_s") == 2.0
    assert one.over(other, "train_s") == 1.0


def test_the_data_and_the_picture_hold_the_same_numbers(tmp_path: Path) -> None:
    content = json.loads(json.dumps(FOUND.to_json()))
    assert content["machine"] == MACHINE
    first = content["rows"][0]
    assert first.items() >= {"setting": "a trunk", "phase": "trunk_frozen", "num_steps": 20, "num_val": 256}.items()
    assert first.items() >= {"naive_s": 3.0, "mtl_s": 0.5, "limit_s": 0.25, "audit_share": 0.125}.items()
    assert first["peak_bytes"] == {"naive": 3_000_000, "mtl": 2000, "limit": 5}
    mtl = first["loops"]["mtl"]
    medians = {"train_s": 0.5, "epoch_s": 0.75, "train_cpu_s": 1.0, "epoch_cpu_s": 1.5, "first_s": 4.5}
    ratios = {"train_over_limit": 2.0, "epoch_over_limit": 1.5}
    ratios |= {"train_cpu_over_limit": 2.0, "epoch_cpu_over_limit": 1.5}
    assert mtl.items() >= (medians | ratios).items()
    assert [lap["train_s"] for lap in mtl["rounds"]] == [0.25, 0.5, 2.0]
    draw(FOUND).savefig(tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 1000


@pytest.mark.parametrize("file", ["bench.txt", "nowhere/bench.png"])
def test_a_plot_that_cannot_be_is_refused_before_anything_is_measured(
    file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--quick", "--plot", file]) == 2
    assert "--plot: expected a .png, .pdf or .svg in a folder that is there" in capsys.readouterr().err


def test_the_command_prints_its_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.import_module("mtl.results.bench.bench"), "SETTINGS", [SMALL])
    monkeypatch.setattr(Setting, "phases", property(lambda _: {"nothing_frozen": []}))
    assert main(["bench", "--quick", "--json", "--plot", str(tmp_path / "bench.svg")]) == 0
    printed = capsys.readouterr()
    (row,) = json.loads(printed.out)["rows"]
    assert list(row["loops"]) == ["naive", "mtl", "limit"]
    assert printed.err.splitlines()[0] == "test_resnet, 32 px, batch 8, dense heads: nothing_frozen"
    assert (tmp_path / "bench.svg").exists()
