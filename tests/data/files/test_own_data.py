"""A data set of the user's own: the file in the documentation, and each way in which one can be wrong."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from mtl.cli import main
from mtl.config import ConfigError, load_config
from mtl.data import DataError
from mtl.runtime import plugin
from mtl.training.setup import RunSetup, assemble
from pages import code_block
from runs import tiny_config

PAGE = "docs/own_data.md"
PHASES = [{"name": "a", "freeze": ["trunk"], "epochs": 2}, {"name": "b", "freeze": ["trunk.conv1"], "steps": 3}]


@pytest.fixture
def birds(tmp_path: Path) -> Iterator[Path]:
    """Configuration, module and 24 pictures of one colour for each species; one of every four has no genus."""
    (tmp_path / "birds.py").write_text(code_block(PAGE, "python"))
    rows = []
    for number in range(24):
        species = number % 5
        Image.new("RGB", (80, 50), (50 * species, 10, 200)).save(tmp_path / f"{number}.png")
        genus = "" if number % 4 == 0 else species % 2
        rows.append([f"{number}.png", "val" if number >= 16 else "train", species, genus])
    with (tmp_path / "birds.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file", "split", "species", "genus"], *rows])
    written = yaml.safe_load(code_block(PAGE, "yaml"))
    written["data"] |= {"batch_size": 4, "options": {"root": str(tmp_path)}}
    yield tiny_config(tmp_path, **written, phases=PHASES)
    sys.modules.pop("birds", None)


def own(folder: Path, body: str, **data: Any) -> RunSetup:
    """A run on a class whose items are the given expression of `i`."""
    (folder / "mine.py").write_text(
        "import torch, numpy as np\nfrom torch.utils.data import Dataset\n\nclass Mine(Dataset):\n"
        "    def __init__(self, split): pass\n    def __len__(self): return 12\n"
        f"    def __getitem__(self, i): return {body}\n"
    )
    data = {"name": "mine:Mine", "image_size": 32, "batch_size": 4} | data
    tasks = {"kind": {"type": "classification", "num_classes": 3}}
    try:
        return assemble(load_config(tiny_config(folder, data=data, tasks=tasks, phases=PHASES)), quiet=True)
    finally:
        sys.modules.pop("mine", None)


def test_the_page_has_a_file_of_few_lines() -> None:
    assert len([line for line in code_block(PAGE, "python").splitlines() if line.strip()]) <= 40


def test_the_data_set_of_the_page_is_read_trained_on_and_reported(birds: Path, tmp_path: Path) -> None:
    setup = assemble(load_config(birds), quiet=True)
    train, val = setup.train, setup.val
    assert (len(train), len(val)) == (16, 8) and train.images.shape == (16, 64, 64, 3)
    assert train.images[7, 5, 5].tolist() == [50 * (7 % 5), 10, 200]
    assert train.labels["species"].tolist() == [number % 5 for number in range(16)]
    assert train.labels["genus"].tolist() == [-1 if n % 4 == 0 else n % 5 % 2 for n in range(16)]
    assert main(["plan", str(birds)]) == 0
    assert main(["train", str(birds), "-q"]) == 0
    run_dir = tmp_path / "runs/tiny"
    assert (run_dir / "report.html").is_file()
    assert main(["audit", str(run_dir)]) == 0
    assert main(["train", str(birds), "-q", "resume=auto"]) == 0


def test_a_report_finds_the_module_where_the_run_did(
    birds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["train", str(birds), "-q", "phases.a.epochs=1", "phases.b.steps=1"]) == 0
    # As in a process of its own, in another folder.
    monkeypatch.setattr(plugin, "_FOLDERS", [])
    sys.modules.pop("birds")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "runs/tiny/report.html").unlink()
    assert main(["report", str(tmp_path / "runs/tiny")]) == 0
    assert (tmp_path / "runs/tiny/report.html").is_file()


def test_workers_read_the_same(birds: Path) -> None:
    one, other = (assemble(load_config(birds, [f"data.num_workers={number}"]), quiet=True) for number in (0, 2))
    for split in ("train", "val"):
        assert torch.equal(getattr(one, split).images, getattr(other, split).images)
        assert torch.equal(getattr(one, split).labels["genus"], getattr(other, split).labels["genus"])


def test_the_first_images_of_a_split_may_be_taken(birds: Path) -> None:
    setup = assemble(load_config(birds, ["data.num_train=12", "data.num_val=5"]), quiet=True)
    assert (len(setup.train), len(setup.val)) == (12, 5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.options.rot=x", "command line: data.options.rot: unknown key; nearest: root"),
        ("data.options.root=3", "command line: data.options.root: expected a valid string, got 3"),
        ("data.options.table=none.csv", r"data.options: birds:Birds, train: FileNotFoundError: .*birds\.py:\d+\)"),
        ("data.name=birds:Bird", "command line: data.name: birds has no 'Bird'; nearest: Birds"),
        ("data.name=birds:Path", "data.name: birds:Path is no subclass of torch.utils.data.dataset.Dataset"),
        ("data.name=brds:Birds", "data.name: 'brds' cannot be imported: No module named 'brds'"),
        ("data.name=birds", r"data\.name: expected one of scenes, .*package\.module:Name, got 'birds'"),
        ("data.num_train=99", "data.num_train: expected at most the 16 images of birds:Birds's split 'train', got 99"),
        ("tasks.genus.label=genes", "tasks.genus.label: birds:Birds has no label 'genes'; it has: species.*"),
    ],
)
def test_a_mistake_is_named_at_its_key(birds: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        assemble(load_config(birds, [override]), quiet=True)


IMAGE = "torch.zeros(3, 32, 32, dtype=torch.uint8)"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            f"{{'image': {IMAGE} + 1 // (i - 7) * 0, 'kind': 0}}",
            r"mine:Mine, train: item 7: ZeroDivisionError.*mine\.py:7\)",
        ),
        ("[1, 2]", "mine:Mine, train: item 0: expected a mapping with 'image', got list"),
        ("{'img': 1, 'kind': 0}", "item 0: expected a mapping with 'image', got one with img, kind; nearest"),
        ("{'image': torch.zeros(3, 32, 32), 'kind': 0}", r"8 or 16 bits .* got float32 of shape \(3, 32, 32\)"),
        (
            "{'image': torch.zeros(3 - (i == 5), 32, 32, dtype=torch.uint8), 'kind': 0}",
            r"item 5: expected an image of 3 channels, got 2",
        ),
        (f"{{'image': {IMAGE}, 'kind': 0 if i < 4 else 0.5}}", r"item 4: kind: expected int64 .* got float32"),
        (f"{{'image': {IMAGE}, 'kind': 'owl'}}", "mine:Mine, train: item 0: kind: expected a number, a tensor or an"),
        (f"{{'image': {IMAGE}, 'kind': 3 * (i == 9)}}", r"train: item 9: kind: expected classes 0 to 2 .* got 3 to 3"),
        (f"{{'image': {IMAGE}, 'kind': None}}", "mine:Mine, train: no item has the label that the task 'kind' learns"),
    ],
)
@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_an_item_that_cannot_be_used_is_named(tmp_path: Path, body: str, message: str, num_workers: int) -> None:
    with pytest.raises((DataError, ConfigError), match=message):
        own(tmp_path, body, num_workers=num_workers)
    assert not (tmp_path / "runs").exists()


def test_arrays_tensors_and_narrow_labels_are_taken_as_they_are(tmp_path: Path) -> None:
    setup = own(tmp_path, "{'image': np.full((32, 32), i, np.uint8), 'kind': np.uint8(i % 3) if i % 2 else None}")
    assert setup.train.images.shape == (12, 32, 32, 1) and setup.train.images[7, 0, 0].tolist() == [7]
    assert setup.train.labels["kind"].tolist() == [-1 if i % 2 == 0 else i % 3 for i in range(12)]
