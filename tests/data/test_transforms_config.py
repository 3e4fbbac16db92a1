"""The settings of transforms: names, options, and what is said about mistakes in them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from mtl.config.error_text import explain
from mtl.config.transform import TransformsConfig
from mtl.config.yaml_source import ConfigSource
from pages import code_block


def test_a_name_is_short_for_a_mapping() -> None:
    names = ["resize", "random_resized_crop", "flip", "scale", "torchvision.transforms.v2:GaussianBlur"]
    short = TransformsConfig.model_validate({"train": names})
    assert short == TransformsConfig.model_validate({"train": [{"name": name} for name in names]})
    assert TransformsConfig().train == TransformsConfig().val == []


def test_what_is_saved_is_read_as_the_same() -> None:
    entries = ["flip", {"name": "scale", "options": {"factors": [1, 2]}}, {"name": "a.b:C", "options": {"d": [1]}}]
    config = TransformsConfig.model_validate({"train": entries, "val": ["resize"]})
    assert TransformsConfig.model_validate(config.model_dump(mode="json")) == config


def test_the_list_in_the_documentation_is_read() -> None:
    written = yaml.safe_load(code_block("docs/transforms.md", "yaml"))["data"]["transform"]
    names = [each.name for each in TransformsConfig.model_validate(written).train]
    assert names == ["scale", "flip", "colour", "torchvision.transforms.v2:GaussianBlur"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("flop", "train.0.name: expected one of resize, random_resized_crop, flip, .*, got 'flop'; nearest: flip"),
        ({"options": {}}, "train.0.name: this key is required"),
        (3, "train.0: expected keys and values, got 3"),
        ({"name": "resize", "options": {}}, "train.0.options: unknown key; the keys here are name"),
        ("rotation", "train.0.options: this key is required"),
        ("colour", "train.0.options: this key is required"),
        (("colour", {}), "train.0.options: expected brightness, contrast, saturation or hue above 0"),
        (("colour", {"hue": 0.6}), "train.0.options.hue: expected a number less than or equal to 0.5, got 0.6"),
        (("flip", {"probability": 1}), "train.0.options.probability: unknown key; the keys here are p, pairs"),
        (("flip", {"p": 1.5}), "train.0.options.p: expected a number less than or equal to 1, got 1.5"),
        (("flip", {"pairs": [[0, 1], [1, 2]]}), r"train.0.options: expected pairs such as \[0, 1\], each point in one"),
        (("flip", {"pairs": [[0, 1, 2]]}), r"train.0.options: expected pairs such as \[0, 1\]"),
        (("scale", {"factors": []}), "train.0.options.factors: expected at least one, got none"),
        (("scale", {"factors": [0.5]}), "train.0.options.factors.0: expected a number greater than or equal to 1"),
        (("rotation", {"degrees": 0}), "train.0.options.degrees: expected a number greater than 0, got 0"),
        (
            ("rotation", {"degrees": 5, "normals_y": "left"}),
            "train.0.options.normals_y: expected one of up, down, got 'left'",
        ),
        (
            ("random_resized_crop", {"scale": [0.5, 0.1]}),
            r"train.0.options: expected scale as \[smallest, largest\]",
        ),
        (("random_resized_crop", {"ratio": [1.0]}), r"train.0.options: expected ratio as \[smallest, largest\]"),
        (("random_resized_crop", {"scale": [0, 1]}), "train.0.options.scale.0: expected a number greater than 0"),
    ],
)
def test_a_mistake_is_named_with_its_key(entry: Any, message: str) -> None:
    written = {"name": entry[0], "options": entry[1]} if isinstance(entry, tuple) else entry
    with pytest.raises(ValidationError) as error:
        TransformsConfig.model_validate({"train": [written]})
    (line,) = [explain(details, TransformsConfig, ConfigSource()) for details in error.value.errors()]
    assert re.match(f"defaults: {message}", line), line
