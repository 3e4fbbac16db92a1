"""What docs/add_task.md shows runs: small in the default tests, as it stands in the slow ones."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from mtl.cli import main
from mtl.cli.program import _parser as parsers
from mtl.training.add_task import _KEPT
from pages import ROOT, code_blocks
from runs import read_model

PAGE = "docs/add_task.md"
TEXT = (ROOT / PAGE).read_text(encoding="utf-8")
# Commands that stand on lines of their own, and those inside a sentence.
COMMANDS = ["".join(found) for found in re.findall(r"^    (mtl .*)$|`(mtl [^`]*\.yaml)`", TEXT, flags=re.MULTILINE)]
SIZES = ["data.num_train=40", "data.num_val=20"]
SMALL = {
    "train": ["trunk={name: test_resnet}", "data.image_size=32", "data.batch_size=8", *SIZES],
    "add-task": SIZES,
}


def follow(folder: Path, small: bool) -> None:
    """Writes the page's files and runs its commands in the order of the page."""
    for name, block in zip(("first", "object", "shirts", "further"), code_blocks(PAGE, "yaml"), strict=True):
        (folder / f"{name}.yaml").write_text(block)
    for command in [*COMMANDS, "mtl train further.yaml"]:
        _, verb, *arguments = shlex.split(command)
        own = SMALL.get(verb, []) if small else []
        quiet = ["-q"] if verb != "audit" else []
        assert main([verb, *arguments, *own, *quiet]) == 0, command


def check(num_images: int) -> None:
    for name in ("rooms-object", "rooms-left"):
        proof = json.loads(Path(f"runs/{name}/unchanged.json").read_text())
        assert proof["equal"] and list(proof["tasks"]) == ["segmentation", "depth"]
    assert json.loads(Path("runs/rooms-object/unchanged.json").read_text())["images"] == num_images
    taken = json.loads(Path("runs/rooms-further/history.json").read_text())["init_from"]
    assert [list(item["tensors"]) for item in taken] == [["trunk", "heads.depth"], ["heads.object"]]
    further = read_model(Path("runs/rooms-further/checkpoints/last"))
    assert {name.split(".")[1] for name in further if name.startswith("heads.")} == {"depth", "thing"}


def test_the_page_runs_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    follow(tmp_path, small=True)
    check(60)


@pytest.mark.slow
def test_the_page_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    follow(tmp_path, small=False)
    check(1000)
    # Digests are those of one kind of CPU; the rest of the lines is shown as it is printed.
    shown = re.findall(r"^    init_from: (.*); digest \w{32}$", TEXT, flags=re.MULTILINE)
    taken = json.loads(Path("runs/rooms-object/history.json").read_text())["init_from"][0]
    parts = ", ".join(f"{name} ({num} tensors)" for name, num in taken["tensors"].items())
    assert shown == [f"{taken['source']}: {parts}"]
    assert "338 tensors are the same to the bit" in capsys.readouterr().out


def test_the_commands_are_found_and_the_table_names_what_stays() -> None:
    assert [command.split()[1] for command in COMMANDS] == ["train", "add-task", "audit", "add-task"]
    assert "add-task" in parsers()[1]
    (stay,) = re.findall(r"Of the run stay (.*?) \|", TEXT)
    assert set(re.findall(r"`(\w+)`", stay)) == {*_KEPT} - {"trunk", "tasks", "data"}
