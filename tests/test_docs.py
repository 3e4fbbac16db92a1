"""What the documentation shows works as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mtl.blueprint import draw_up_without_weights
from mtl.cli import main
from mtl.config import load_config

ROOT = Path(__file__).parent.parent


def yaml_blocks(page: str) -> list[str]:
    return re.findall(r"```yaml\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_configuration_in_the_readme_loads_and_its_phases_resolve(tmp_path: Path) -> None:
    (block,) = yaml_blocks("README.md")
    file = tmp_path / "readme.yaml"
    file.write_text(block)
    assert [phase.name for phase in draw_up_without_weights(load_config(file)).phases] == ["warm-heads", "finetune"]


def test_the_phases_in_the_documentation_resolve(tmp_path: Path) -> None:
    (block,) = yaml_blocks("docs/phases.md")
    base = (ROOT / "configs/scenes.yaml").read_text(encoding="utf-8")
    file = tmp_path / "phases.yaml"
    file.write_text(base[: base.index("phases:")] + block)
    names = [phase.name for phase in draw_up_without_weights(load_config(file)).phases]
    repeated = [f"{part}.{number}" for number in (1, 2) for part in ("heads", "trunk")]
    assert names == ["warm-heads", "finetune", *repeated, "polish-depth", "last-word"]


def commands(page: str) -> list[list[str]]:
    """The `mtl plan` commands of a page, each as its arguments."""
    lines = re.findall(r"^    mtl (plan configs/.*?)(?: *[#>].*)?$", (ROOT / page).read_text(), flags=re.MULTILINE)
    return [line.split() for line in lines]


@pytest.mark.parametrize("arguments", commands("docs/phases.md"), ids=" ".join)
def test_a_command_in_the_documentation_runs(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    assert main(arguments) == 0
    assert capsys.readouterr().out


def test_the_commands_of_the_documentation_are_found() -> None:
    assert len(commands("docs/phases.md")) == 6
