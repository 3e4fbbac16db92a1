"""What the documentation shows works as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mtl.cli import main
from mtl.config import load_config
from mtl.phases.plan import Plan, make_plan
from mtl.phases.plan.text import full_plan
from mtl.phases.setup import ModelSetup, build_meta_setup

ROOT = Path(__file__).parent.parent


def yaml_blocks(page: str) -> list[str]:
    return re.findall(r"```yaml\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_configuration_in_the_readme_loads_and_its_phases_resolve(tmp_path: Path) -> None:
    (block,) = yaml_blocks("README.md")
    file = tmp_path / "readme.yaml"
    file.write_text(block)
    assert [phase.name for phase in build_meta_setup(load_config(file)).phases] == ["warm-heads", "finetune"]


def test_the_phases_in_the_documentation_resolve(tmp_path: Path) -> None:
    (block,) = yaml_blocks("docs/phases.md")
    base = (ROOT / "configs/scenes.yaml").read_text(encoding="utf-8")
    file = tmp_path / "phases.yaml"
    file.write_text(base[: base.index("phases:")] + block)
    names = [phase.name for phase in build_meta_setup(load_config(file)).phases]
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


# Figures: each is read out of the page that states it, and computed from the default configuration

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
NUMBERS = dict(zip(WORDS, range(1, 13), strict=True))


@pytest.fixture(scope="module")
def default() -> ModelSetup:
    return build_meta_setup(load_config(ROOT / "configs/scenes.yaml"))


@pytest.fixture(scope="module")
def plan(default: ModelSetup) -> Plan:
    return make_plan(default, with_forecast=True)


def stated(page: str, expression: str) -> list[str]:
    """What a page says at an expression's group, line breaks aside; an expression that is never found is an error."""
    found: list[str] = re.findall(expression, " ".join((ROOT / page).read_text(encoding="utf-8").split()))
    assert found, f"{page} no longer says {expression!r}"
    return found


@pytest.mark.parametrize("page", ["README.md", "configs/scenes.yaml"])
def test_the_number_of_frozen_blocks_is_the_one_stated(page: str, default: ModelSetup) -> None:
    frozen = default.phases[1].freeze.plan.names.frozen
    blocks = {match[0] for name in frozen if (match := re.match(r"trunk\.blocks\.\d+\.\d+(?=\.)", name))}
    assert [NUMBERS[word] for word in stated(page, r"the stem and the first (\w+) blocks")] == [len(blocks)]


def test_the_tasks_steps_and_tensors_of_the_default_run_are_those_stated(default: ModelSetup) -> None:
    tasks = default.config.tasks
    assert [NUMBERS[word] for word in stated("README.md", r"trains (\w+) tasks")] == [len(tasks)]
    assert stated("README.md", r"segmentation into (\d+) classes") == [str(default.tasks["segmentation"].num_outputs)]
    num_steps = sum(phase.steps_per_epoch * (phase.config.epochs or 0) for phase in default.phases)
    assert stated("README.md", r"checks in (\d+) steps") == [str(num_steps)]
    frozen = [phase.freeze.plan.names for phase in default.phases]
    numbers = [
        f"{phase.name}: {len(names.frozen) + len(names.frozen_buffers)}"
        for phase, names in zip(default.phases, frozen, strict=True)
    ]
    assert stated("README.md", r"frozen tensors bit-identical \((.*?)\)") == [", ".join(numbers)]


@pytest.mark.parametrize("page", ["README.md", "docs/dividend.md"])
def test_lines_of_a_plan_are_those_that_the_plan_prints(page: str, plan: Plan) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    keys = "frozen|trained|freeze|computed once|in eval mode|memory|an image|thawed|all-reduce|adamw"
    shown = re.findall(rf"^    (finetune: .*batches of \d+|  (?:{keys})  +\S.*)$", text, flags=re.MULTILINE)
    printed = full_plan(plan).splitlines()
    assert shown
    for line in shown:
        start, is_cut = line.rstrip(" ."), line.endswith("...")
        assert any(each.startswith(start) if is_cut else each == line for each in printed), line


@pytest.mark.parametrize("page", ["README.md", "docs/dividend.md"])
def test_the_size_of_what_is_kept_is_the_one_planned(page: str, plan: Plan) -> None:
    sizes = stated(page, r"features: the trunk computed once, .*? kept in memory: (.*? for \d+ images)")
    kept = re.search(r"the trunk; kept: .* an image, (.*?) in all", full_plan(plan))
    assert kept and sizes == [f"{kept[1]} for {6000 + 500} images"]
