"""Every block of code and every command of every page: configurations load, Python runs, commands are understood."""

from __future__ import annotations

import ast
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from mtl.cli import main
from mtl.cli.program import _parser
from mtl.config import load_config
from pages import PAGES, ROOT, Block, blocks_of, commands_of

BLOCKS = [block for page in PAGES for block in blocks_of(page)]
COMMANDS = [(page, command) for page in PAGES for command in commands_of(page)]
# Pages whose blocks and commands are followed from top to bottom by a test of their own.
FOLLOWED = {
    "docs/tutorial.md": "tests/cli/test_tutorial.py",
    "docs/trained_models.md": "tests/results/test_trained.py",
}
# The first line of a block that is for another library, which is not installed here.
ELSEWHERE = "# not run here: "


def of_language(language: str) -> Any:
    return pytest.mark.parametrize("block", [each for each in BLOCKS if each.language == language], ids=str)


def test_every_block_says_its_language() -> None:
    assert [str(block) for block in BLOCKS if block.language not in ("yaml", "python", "csv")] == []
    assert len(BLOCKS) > 30 and len(COMMANDS) > 30


def test_pages_with_a_test_of_their_own_are_read_by_it() -> None:
    for page, test in FOLLOWED.items():
        assert page in (ROOT / test).read_text(encoding="utf-8")


# Configurations

# What a block leaves out that is a part of a configuration.
MINIMAL = {
    "name": "shown",
    "trunk": {"name": "resnet18"},
    "data": {"name": "scenes", "image_size": 64},
    "tasks": {"depth": {"type": "depth"}},
    "phases": [{"name": "all", "epochs": 1}],
}
# Blocks that belong to the one before them on their page.
SECONDS = {"tasks: {object: {type: classification, data: [shop]}}\n"}


def read(text: str) -> Any:
    """YAML whose keys are their text, as configurations are read: `on` is no truth value."""
    return yaml.safe_load(re.sub(r"(?<![\w\"'])on:", "'on':", text))


def configurations(block: Block) -> list[dict[str, Any]]:
    """What a block says; a key that stands in several lines is shown in several ways."""
    keys = re.findall(r"^(\w+):", block.text, flags=re.MULTILINE)
    if len(keys) > len(set(keys)):
        return [read(line) for line in block.text.splitlines()]
    return [read(block.text)]


@of_language("yaml")
def test_a_configuration_loads(block: Block, tmp_path: Path) -> None:
    if block.text.startswith(ELSEWHERE):
        assert read(block.text)
        return
    whole = dict(MINIMAL)
    if block.text in SECONDS:
        whole = read(next(each.text for each in BLOCKS if each.page == block.page))
    for shown in configurations(block):
        (tmp_path / "shown.yaml").write_text(yaml.safe_dump((whole if "_base_" not in shown else {}) | shown))
        assert load_config(tmp_path / "shown.yaml").tasks


# Python


class Small(nn.Module):
    """A model whose layers are named as those of the pages are."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.layer1, self.layer2, self.out = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.layer2(self.layer1(self.trunk(x))))  # type: ignore[no-any-return]


def surroundings() -> dict[str, Any]:
    """What the pages' code takes for granted."""
    torch.manual_seed(0)
    model = Small()
    model.trunk.requires_grad_(False)
    return {
        "torch": torch,
        "nn": nn,
        "model": model,
        "optimizer": torch.optim.SGD([*model.layer1.parameters(), *model.layer2.parameters(), *model.out.parameters()]),
        "loader": [(torch.randn(3, 4), torch.randn(3, 4)) for _ in range(7)],
        "loss_of": nn.functional.mse_loss,
        "cfg": SimpleNamespace(MODEL=SimpleNamespace(NOT_TRAIN_IN_MULTI_TASK=["trunk"])),
    }


@of_language("python")
def test_python_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = compile(block.text, str(block), "exec")
    if block.text.startswith(ELSEWHERE) or block.page in FOLLOWED:
        assert ast.parse(block.text).body
        return
    # As a module: classes of a page look for their own one.
    monkeypatch.setitem(sys.modules, "shown", SimpleNamespace())
    monkeypatch.chdir(tmp_path)
    exec(code, surroundings() | {"__name__": "shown"})


# Commands


def understood(words: list[str]) -> None:
    """Raises if the program does not take a command's words."""
    parser, _ = _parser()
    options, rest = parser.parse_known_args(words)
    assert not rest or "overrides" in options, rest
    assert not [word for word in rest if word.startswith("-")]


def script_takes(script: str, words: list[str]) -> None:
    source = (ROOT / script).read_text(encoding="utf-8")
    for word in words:
        if word.startswith("--"):
            assert {word, word[2:].replace("-", "_")} & set(re.findall(r"[\w-]+", source)), f"{script} has no {word}"


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=lambda value: str(value))
def test_a_command_is_understood(page: str, command: str) -> None:
    del page
    for part in command.split(" && "):
        words = shlex.split(part.split(" > ")[0])
        match words:
            case ["mtl" | ".venv/bin/mtl", *arguments]:
                understood(arguments)
            case ["bash", "scripts/train_mtl.sh", "--help"]:
                pass
            case ["bash", "scripts/train_mtl.sh", *arguments]:
                understood(["train", *(arguments or ["configs/scenes.yaml"])])
            case ["bash", script, *_]:
                assert (ROOT / script).is_file()
            case [_, "-m", "torch.distributed.run" | "mtl", *_]:
                understood(words[words.index("mtl") + 1 :])
            case ["python" | ".venv/bin/python", script, *arguments]:
                script_takes(script, arguments)
            case ["pip", "install", *wanted]:
                names = re.findall(r"mtl-freeze\[(\w+)\]", " ".join(wanted))
                settings = (ROOT / "setup.cfg").read_text(encoding="utf-8")
                assert wanted and all(f"\n{name} =\n" in settings for name in names)
            case ["git" | "source" | "cd" | "pre-commit", *_]:
                pass
            case _:
                raise AssertionError(f"not understood: {part}")


PLANS = sorted({command for _, command in COMMANDS if command.startswith("mtl plan configs/") and "[" not in command})
# The plans of recipes are made by their own test.
QUICK = [command for command in PLANS if "recipes" not in command]


@pytest.mark.parametrize("command", QUICK)
def test_a_plan_of_the_documentation_can_be_made(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command.split(" > ")[0])[1:]) == 0
    assert capsys.readouterr().out


def test_the_plans_of_the_documentation_are_found() -> None:
    assert len(QUICK) >= 6
