"""The run that a new user sees first, made smaller: real weights, both phases, every task learns."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtl.config import load_config
from mtl.training.run import train
from mtl.training.setup import assemble

CONFIG = Path(__file__).parents[2] / "configs" / "scenes.yaml"


@pytest.mark.slow
def test_every_task_beats_the_trivial_predictor_and_fine_tuning_beats_the_frozen_trunk(tmp_path: Path) -> None:
    data = ["data.image_size=64", "data.batch_size=32", "data.num_train=1600", "data.num_val=200"]
    overrides = [f"runs_dir={tmp_path}", *data, "phases.finetune.epochs=4"]
    parts = assemble(load_config(CONFIG, overrides), quiet=True)
    result = train(parts, quiet=True)
    assert result.report.ok and [phase.completed for phase in result.report.phases] == [True, True]
    for name, task in parts.tasks.items():
        goal = task.goal
        trivial = result.trivial[name][goal.metric]
        frozen, tuned = (scores[name][goal.metric] for scores in result.scores.values())
        assert goal.skill(tuned, trivial) > goal.skill(frozen, trivial) > 0, name
