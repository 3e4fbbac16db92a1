"""Configurations that come with mtl, called by a name without a suffix."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from mtl.cli import main
from mtl.config import ConfigError, load_config
from mtl.config.examples import examples
from mtl.config.yaml_text import dump_yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_examples_are_the_files_of_configs() -> None:
    files = sorted(file.relative_to(ROOT / "configs") for file in (ROOT / "configs").rglob("*.yaml"))
    assert [*examples()] == [file.with_suffix("").as_posix() for file in files]
    assert {"scenes", "multifashion", "recipes/lp_ft"} <= examples().keys()


@pytest.mark.parametrize("name", ["scenes", "recipes/lp_ft"])
def test_a_name_is_the_example_of_that_name(name: str) -> None:
    config = load_config(Path(name), ["seed=7"])
    assert (config.name, config.seed) == (name.rpartition("/")[2], 7)
    assert config.phases == load_config(ROOT / f"configs/{name}.yaml").phases
    assert config._command == f"mtl train {name} seed=7"


def test_a_file_of_one_s_own_comes_before_an_example(tmp_path: Path) -> None:
    (tmp_path / "scenes").write_text("_base_: recipes/last_k\nname: mine\n")
    assert load_config(Path("scenes")).name == "mine"


def test_a_configuration_may_be_based_on_an_example(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("_base_: [scenes, recipes/lp_ft]\nname: mine\n")
    assert [phase.name for phase in load_config(tmp_path / "mine.yaml").written_phases] == ["probe", "finetune"]


def test_a_name_that_is_none_is_an_error_with_those_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "scene"]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: scene: no such file; there are: .*\bscenes, .*\n", said)
    with pytest.raises(ConfigError, match=r"^configs/scenes.yaml: no such file$"):
        load_config(Path("configs/scenes.yaml"))


def test_words_that_are_truth_values_elsewhere_are_written_in_quotes() -> None:
    data = {"on": "off", "yes": ["no", "On"], "t": True, "n": None, "number": 0.001, "text": "1"}
    text = dump_yaml(data)
    assert yaml.safe_load(text) == data and "'on': 'off'" in text
