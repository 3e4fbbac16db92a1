"""A learning-rate schedule of the user's own: the file in the documentation, and each way in which one can be wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from mtl.cli import main
from mtl.config import ConfigError, load_config
from mtl.phases.setup import build_meta_setup
from pages import code_block
from runs import small_config

PAGE = "docs/own_lr_schedule.md"
PHASES = [{"name": "a", "freeze": ["trunk"], "steps": 30}, {"name": "b", "steps": 20, "lr_schedule": "constant"}]

FALLING = """

class Falling:
    def __call__(self, step, num_steps, steps_per_epoch):
        return 1 - 2 * step / (num_steps - 1)
"""


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "warm.py").write_text(code_block(PAGE, "python") + FALLING)
    written = yaml.safe_load(code_block(PAGE, "yaml"))
    yield small_config(tmp_path, **written, phases=PHASES, tracking={"log_every_steps": 1})
    sys.modules.pop("warm", None)


def test_the_schedule_of_the_page_sets_the_rate_of_every_step(run: Path, tmp_path: Path) -> None:
    assert len([line for line in code_block(PAGE, "python").splitlines() if line.strip()]) <= 40
    assert main(["train", str(run), "-q"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    rates = {row["step"]: row["train/lr"] for row in rows if "train/lr" in row}
    for step in range(30):
        assert rates[step + 1] == 1e-3 * min((step + 1) / 10, (10 / (step + 1)) ** 0.5)
    assert rates[31] == rates[50] == 1e-3
    assert main(["train", str(run), "-q", "resume=auto"]) == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr_schedule.options.warmup=3", r"lr_schedule\.options\.warmup: unknown key; nearest: warmup_steps"),
        ("optim.lr_schedule.options.warmup_steps=x", r"options\.warmup_steps: expected a valid integer, got 'x'"),
        ("optim.lr_schedule.options.warmup_steps=0", r"lr_schedule\.name: .*step 0: ZeroDivisionError.*warm\.py"),
        ("optim.lr_schedule=warm:Falling", r"lr_schedule\.name: warm:Falling gave -1\.0 at step 29; expected the"),
        ("optim.lr_schedule.name=warm:WarmUpSqrt", r"lr_schedule\.name: warm has no 'WarmUpSqrt'; nearest: Warm"),
        ("optim.lr_schedule.name=cosin", r"expected one of constant, .*Name, got 'cosin'; nearest: cosine"),
    ],
)
def test_a_mistake_is_named_at_its_key(run: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_meta_setup(load_config(run, [override]))
