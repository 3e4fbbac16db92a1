"""The configurations of public data sets in configs/ fit the sets that they name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from data_settings import SETTINGS
from mtl.config import RunConfig
from mtl.config.tasks import DepthConfig, NormalsConfig
from mtl.data.files.sets import NAMES, public_set

CONFIGS = Path(__file__).parents[4] / "configs"


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    return content


@pytest.mark.parametrize("name", NAMES)
def test_a_set_has_a_config_with_its_keys_whose_tasks_learn_its_labels(name: str) -> None:
    config, kind = read(name), public_set(name)
    assert config["name"] == config["data"]["name"] == name
    SETTINGS[name].model_validate(config["data"])
    for task, settings in config["tasks"].items():
        label = settings.get("label", task)
        assert label in kind.label_kinds
        if label in kind.classes and "num_classes" in settings:
            assert settings["num_classes"] == len(kind.classes[label])


@pytest.mark.parametrize("name", NAMES)
def test_everything_but_the_data_is_valid(name: str) -> None:
    config = RunConfig.model_validate(read(name) | {"data": {"name": "scenes"}})
    assert len(config.written_phases) == 2
    for task, settings in config.tasks.items():
        (own,) = public_set(name).label_kinds[settings.label or task]
        expected = {DepthConfig: "depth", NormalsConfig: "normals"}.get(type(settings), own)
        assert own == expected


@pytest.mark.parametrize("name", NAMES)
def test_the_header_says_how_to_run_it_and_where_the_data_is_from(name: str) -> None:
    lines = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if line.startswith("#"))
    assert f"bash scripts/train_mtl.sh configs/{name}.yaml data.root=/where/it/is" in text
    assert "# Data: " in text
    assert "# Published" in text
    assert max(map(len, lines)) <= 120
