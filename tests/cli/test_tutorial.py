"""The tutorial, followed to the letter: every block and every command of it, in its order, in one folder."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from mtl.cli import main
from pages import ROOT, blocks_of, commands_of
from runs import read_metrics

PAGE = "docs/tutorial.md"
# What is done before there is a program; scripts/test.sh has done it for this test.
SET_UP = ("git ", "bash scripts/train_mtl.sh --help", "source ")


def steps() -> list[str]:
    """The page's commands and blocks in their order."""
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    commands = [command for command in commands_of(PAGE) if not command.startswith(SET_UP)]
    assert len(commands) < len(commands_of(PAGE))
    places: dict[int, str] = {}
    start = 0
    for command in commands:
        start = text.index(f"    {command}", start) + 1
        places[start] = command
    return [step for _, step in sorted(places.items() | {(text.index(b.text), b.text) for b in blocks_of(PAGE)})]


def test_the_page_is_followed_from_its_configuration_to_the_end() -> None:
    found = steps()
    assert found[0] == blocks_of(PAGE)[0].text and found[0].startswith("name: rooms")
    assert sum(step.startswith("mtl ") for step in found) == 7 and len(found) == 11


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:hazard:UserWarning")
def test_the_tutorial_does_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / PAGE).read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    said: dict[str, str] = {}
    for step in steps():
        if step.startswith("name: rooms"):
            Path("rooms.yaml").write_text(step)
        elif step.startswith("mtl "):
            expected = 2 if 'trunk.block"' in step else 0
            assert main(shlex.split(step)[1:]) == expected, step
            written = capsys.readouterr()
            said[step] = written.out + written.err
        else:
            exec(compile(step, PAGE, "exec"), names)
            said[step] = capsys.readouterr().out

    plan = said["mtl plan rooms.yaml"]
    keys = "frozen|trained|freeze|unreached"
    shown = re.findall(rf"^    ((?:upper-half:|  (?:{keys}) ).*?)(?: \.\.\.)?$", page, re.MULTILINE)
    assert len(shown) == 5 and all(line.rstrip(", ") in plan for line in shown)
    refused = next(text for step, text in said.items() if 'trunk.block"' in step)
    assert "pattern 'trunk.block' matches nothing (nearest: trunk.blocks" in refused
    (audit,) = re.findall(r"^    (audit: clean; .*?); \.\.\.$", page, re.MULTILINE)
    assert audit in said["mtl train rooms.yaml"]
    assert "audit: clean" in said["mtl audit runs/rooms"] and "not proven" not in said["mtl audit runs/rooms"]
    assert len([row for row in read_metrics(Path("runs/shorter")) if "val/score" in row]) == 4

    read, faulty, _ = [step for step in said if not step.startswith("mtl ")]
    scores, ok, num = said[read].splitlines()
    assert len(json.loads(scores)) == 5 and ok == "True" and int(num) > 100
    # What the page prints stands next to the print, as a comment.
    printed = said[faulty].splitlines()
    comments = re.findall(r"^print\(.*\)  # (.*)$", faulty, re.MULTILINE)
    assert printed[:2] == comments[:2] and eval(printed[2]) == set(comments[2].split(", "))
    for file in ("samples.png", "rooms.png", "runs/rooms/report.html", "runs/rooms/checkpoints/best/model.safetensors"):
        assert Path(file).stat().st_size > 1000
