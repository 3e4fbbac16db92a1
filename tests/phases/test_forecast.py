"""What `mtl plan` says of kept activations, from shapes alone, is what a run then keeps."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from mtl.cli import main
from mtl.config import load_config
from mtl.phases.plan import make_plan
from mtl.phases.setup import build_meta_setup
from mtl.runtime.text import in_bytes
from mtl.training.run import train
from runs import small_config, small_parts

PHASES: list[dict[str, Any]] = [
    {"name": "warm", "freeze": ["trunk"], "epochs": 2},
    {"name": "half", "freeze": ["trunk@first:50%"], "epochs": 2},
    {"name": "all", "epochs": 2},
    {"name": "off", "freeze": ["trunk"], "epochs": 2, "cache": "off"},
]


@pytest.mark.parametrize(
    "trunk", ["test_resnet", *(pytest.param(each, marks=pytest.mark.slow) for each in ("test_vit", "test_convnext"))]
)
def test_the_forecast_is_what_the_run_keeps(trunk: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mtl")
    changes: dict[str, Any] = {"trunk": {"name": trunk}, "phases": PHASES, "cache": {"mode": "ram"}}
    plan = make_plan(build_meta_setup(load_config(small_config(tmp_path, **changes))), with_forecast=True)
    warm, half, everything, off = (phase.kept for phase in plan.phases)
    assert warm is not None and half is not None and everything is not None and off is not None
    assert warm.modules == 0 < half.modules
    assert warm.bytes == 60 * warm.bytes_per_image > 0
    assert "needs the images" in everything.why_not
    assert off.why_not == "cache is off"
    train(small_parts(tmp_path, **changes), quiet=True)
    said = [message for message in caplog.messages if message.startswith("features: ")]
    assert said[0].startswith("features: the trunk computed once")
    assert f"kept in memory: {in_bytes(warm.bytes)} for 60 images" in said[0]
    assert said[1].startswith(f"features: the first {half.modules} module")
    assert f"kept in memory: {in_bytes(half.bytes)} for 60 images" in said[1]
    assert said[2] == f"features: not kept: {everything.why_not}"


def test_the_plan_shows_it_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = small_config(tmp_path, phases=PHASES)
    assert main(["plan", str(file), "cache.dtype=bfloat16"]) == 0
    half = capsys.readouterr().out
    assert main(["plan", str(file)]) == 0
    whole = capsys.readouterr().out
    lines = [line.split("computed once")[1].strip() for line in whole.splitlines() if "computed once" in line]
    assert lines[0].startswith("the trunk; kept: ")
    assert lines[3] == "nothing: cache is off"
    assert "the trunk; kept: " in half and lines[0] not in half
