"""What `results.json` says of a run is what happened, over interruptions too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from crashes import crashed, resume
from mtl.config import load_config
from mtl.optim.task_gradients import trunk_groups
from mtl.phases.plan import make_plan
from mtl.phases.setup import build_model_setup
from mtl.runtime.machine import machine
from mtl.training.run import train
from runs import read_metrics, tiny_config, tiny_parts

NOTHING = {"kept_in": "off", "modules": 0, "image_s": 0.0, "num_computed": 0, "compute_s": 0.0, "num_read": 0}


def results_of(run_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run_dir / "results.json").read_text())
    return content


def counts(kept: dict[str, Any]) -> tuple[Any, ...]:
    return kept["kept_in"], kept["modules"], kept["num_computed"], kept["num_read"]


def test_an_interrupted_run_tells_of_its_phases_and_sessions(tmp_path: Path) -> None:
    run_dir = crashed(tmp_path, 9)
    before = results_of(run_dir)
    assert [end["reason"] for end in before["phases"]] == ["2 epochs done"]
    resume(tmp_path)
    results = results_of(run_dir)
    assert [(end["ended"], end["entered"], end["reason"], end["step"], end["epoch"]) for end in results["phases"]] == [
        *(("a", "b", "2 epochs done", 6, 2), ("b", "c", "5 steps done", 11, 4)),
        ("c", None, "evaluated", 11, 4),
    ]
    assert results["phases"][0] == before["phases"][0]
    times = [end["train_s"] for end in results["phases"]]
    assert 0 < times[0] < times[1] < times[2] <= results["train_s"]
    assert [session["step"] for session in results["sessions"]] == [0, 8]
    assert all(session["machine"] == machine() and session["device"] == "cpu" for session in results["sessions"])
    assert results["sessions"][0] == before["sessions"][0]
    # Two passes over 40 images, each followed by 20 for validation; each of them was computed once. FAMO looks at the
    # last batch of eight once more after each of the six steps.
    assert counts(results["phases"][0]["kept"]) == ("ram", 0, 60, 120 + 6 * 8)
    assert results["phases"][0]["kept"]["compute_s"] > 0
    for end in results["phases"]:
        last = [row for row in read_metrics(run_dir) if row["phase"] == end["ended"] and "val/score" in row][-1]
        logged = {f"val/{task}/{name}": value for task, own in end["scores"].items() for name, value in own.items()}
        assert len(logged) == 4 and last.items() >= logged.items()


def test_a_phase_that_keeps_nothing_says_so_and_metrics_have_their_directions(tmp_path: Path) -> None:
    parts = tiny_parts(tmp_path, phases=[{"name": "a", "steps": 1, "cache": "off"}])
    results = results_of(train(parts, quiet=True).run_dir)
    assert results["phases"][0]["kept"] == NOTHING
    assert results["trivial"] == parts.trivial
    assert results["tasks"]["normals"]["directions"] == {
        "mean": "lower",
        "median": "lower",
        "within_11": "higher",
        "within_22": "higher",
        "within_30": "higher",
    }


@pytest.mark.parametrize("trunk", ["test_resnet", "test_vit"])
def test_the_parts_of_a_plan_are_the_depth_groups_and_heads_each_tensor_once(tmp_path: Path, trunk: str) -> None:
    phases = [
        {"name": "a", "freeze": ["trunk"], "epochs": 1},
        {"name": "b", "freeze": ["trunk@first:50%", "heads.object", "**.bias"], "tasks": ["depth"], "epochs": 1},
    ]
    file = tiny_config(tmp_path, trunk={"name": trunk}, phases=phases, balance={"method": "uw"})
    setup = build_model_setup(load_config(file))
    groups = {name: len(group) for name, group in trunk_groups(setup.model.trunk).items()}
    plan = make_plan(setup)
    for phase in plan.phases:
        heads = [f"heads.{task}" for task in setup.tasks]
        assert [part.name for part in phase.parts] == [*groups, *heads, "balance"]
        assert sum(part.count for part in phase.parts) == len(plan.parameters)
        assert {part.name: part.count for part in phase.parts}.items() >= groups.items()
        assert sum(part.frozen for part in phase.parts) == phase.frozen.count
        by_hand = {
            f"heads.{task}": sum(name.startswith(f"heads.{task}.") for name in phase.frozen.names)
            for task in setup.tasks
        }
        assert {part.name: part.frozen for part in phase.parts}.items() >= by_hand.items()
