"""The sweeps of configs/sweeps: each trial, its command expanded as wandb's agent does, is a run that trains."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

import wandb_file
from mtl.config import load_config
from mtl.phases.setup import build_meta_setup
from processes import HANGS_S

ROOT = Path(__file__).parents[2]
SWEEPS = sorted((ROOT / "configs/sweeps").glob("*.yaml"))
# What makes a trial of configs/scenes.yaml one of seconds; it comes last, as a user's own additions would.
TINY = [
    *("trunk={name: test_resnet}", "data.num_train=40", "data.num_val=20", "data.image_size=32", "data.batch_size=8"),
    *("phases.warm-heads.epochs=1", "phases.finetune.epochs=1"),
]


def values_of(parameter: dict[str, Any]) -> list[Any]:
    """All values of a parameter; the ends and an odd one between them of a range."""
    if "values" in parameter:
        return list(parameter["values"])
    low, high = parameter["min"], parameter["max"]
    return [low, high, low + (high - low) * 0.123456789012345, 1e-05 * high]


def expanded(sweep: dict[str, Any], arguments: dict[str, Any]) -> list[str]:
    """A trial's command, as `wandb agent` makes it: `Agent._command_run` of wandb/wandb_agent.py."""
    parts = create_sweep_command_args({"args": {name: {"value": value} for name, value in arguments.items()}})
    parts |= {"program": [sweep["program"]], "env": ["/usr/bin/env"], "interpreter": ["python"]}
    command: list[str] = []
    for word in map(str, create_sweep_command(list(sweep["command"]))):
        command += parts[word[2:-1]] if word.startswith("${") and word.endswith("}") else [word]
    return command


def test_there_are_sweeps() -> None:
    assert len(SWEEPS) >= 2


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_every_value_of_a_sweep_is_an_override_that_is_read(file: Path) -> None:
    sweep = yaml.safe_load(file.read_text())
    assert sweep["metric"] == {"name": "val/best_score", "goal": "maximize"}
    first = {name: values_of(parameter)[0] for name, parameter in sweep["parameters"].items()}
    for name, parameter in sweep["parameters"].items():
        for value in values_of(parameter):
            env, bash, script, config, *overrides = expanded(sweep, first | {name: value})
            assert [env, bash, script, config] == [
                "/usr/bin/env",
                "bash",
                "scripts/train_mtl.sh",
                "configs/scenes.yaml",
            ]
            assert overrides[-1] == "name=auto" and len(overrides) == len(first) + 1
            setup = build_meta_setup(load_config(ROOT / config, overrides))
            assert setup.unread == []
            key, *_ = name.split(".")
            if key == "optim":
                assert getattr(setup.config.optim, name.split(".")[1]) == pytest.approx(value)


@pytest.mark.slow
@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_one_trial_trains_under_a_name_of_its_own_and_is_the_sweep_s_run(
    file: Path, tmp_path: Path, cache_dir: Path
) -> None:
    sweep = yaml.safe_load(file.read_text())
    arguments = {name: values_of(parameter)[-2] for name, parameter in sweep["parameters"].items()}
    # What the agent writes for wandb.init, and sets in the environment of a trial.
    parameters = tmp_path / "config-trial7.yaml"
    given = {name: {"value": value} for name, value in arguments.items()}
    parameters.write_text(yaml.safe_dump({"wandb_version": 1} | given))
    environment = os.environ | {
        "WANDB_MODE": "offline",
        "WANDB_SWEEP_ID": "sweep7",
        "WANDB_RUN_ID": "trial7",
        "WANDB_PROJECT": "of-the-agent",
        "WANDB_SWEEP_PARAM_PATH": str(parameters),
        "MTL_CACHE_DIR": str(cache_dir),
    }
    command = [*expanded(sweep, arguments), *TINY, f"runs_dir={tmp_path}/runs"]
    if "phases.finetune.freeze" in arguments:
        command.append('phases.finetune.freeze=["type:BatchNorm2d"]')
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANGS_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"scenes-\d{3}", run_dir.name)
    logged = wandb_file.offline_file(run_dir)
    (run,) = wandb_file.of_kind(logged, "run")
    assert (run.run_id, run.sweep_id, run.project, run.display_name) == (
        "trial7",
        "sweep7",
        "of-the-agent",
        run_dir.name,
    )
    found = wandb_file.config(logged)
    assert {name: found[name] for name in arguments} == arguments
    state = json.loads((run_dir / "checkpoints/last/state.json").read_text())
    assert state["wandb_id"] == "trial7"
    assert isinstance(wandb_file.summary(logged)["val/best_score"], float)
