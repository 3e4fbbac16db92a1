"""Generated schedules: they load and plan next to the file they were made from, and train what they promise."""

from __future__ import annotations

import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from mtl.cli import main
from mtl.config import load_config
from mtl.phases.plan import Plan, make_plan
from mtl.phases.plan.generate import SCHEDULES
from mtl.phases.plan.rehearsal import Cost
from mtl.phases.setup import build_meta_setup
from mtl.training.run import train
from mtl.training.setup import assemble
from runs import TINY, tiny_config

# With a stem and blocks, with tokens and a position table, with depthwise convolutions, with windows.
TRUNKS = {
    "test_resnet": 32,
    "test_vit": 32,
    "resnet18": 32,
    "tf_efficientnet_lite0": 32,
    "test_convnext": 32,
    "swin_tiny_patch4_window7_224": 64,
}


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def base_of(folder: Path, trunk: str = "test_resnet", **changes: Any) -> Path:
    data = TINY["data"] | {"image_size": TRUNKS[trunk]}
    phases = [{"name": "only", "steps": 1}]
    return tiny_config(folder, **({"trunk": {"name": trunk}, "data": data, "phases": phases} | changes))


def generated(capsys: pytest.CaptureFixture[str], base: Path, kind: str, *arguments: str) -> Path:
    """Saves what `mtl plan --generate` prints next to its base."""
    code = main(["plan", str(base), "--generate", kind, *arguments])
    said = capsys.readouterr()
    assert (code, said.err) == (0, "")
    file = base.with_name(f"{kind}.yaml")
    file.write_text(said.out)
    return file


def plan_of(file: Path) -> Plan:
    model_setup = build_meta_setup(load_config(file))
    # What a step costs has tests of its own, and would take most of the time.
    with patch.multiple("mtl.phases.plan.plan", rehearse=lambda *_: Cost(1, 1, 1), _COSTS={}):
        return make_plan(model_setup)


def trained(plan: Plan) -> dict[str, set[str]]:
    return {phase.name: set(phase.trainable.names) for phase in plan.phases}


def below(names: set[str] | tuple[str, ...], module: str) -> set[str]:
    return {name for name in names if name.startswith(f"{module}.")}


@pytest.mark.parametrize("trunk", TRUNKS)
def test_gradual_trains_the_heads_first_then_ever_more_and_everything_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], trunk: str
) -> None:
    plan = plan_of(generated(capsys, base_of(tmp_path, trunk), "gradual"))
    sets = list(trained(plan).values())
    assert len(sets) > 3
    assert sets[0] == set(plan.parameters) - below(plan.parameters, "trunk")
    for smaller, larger in pairwise(sets):
        assert smaller < larger
    assert not any(phase.unreached for phase in plan.phases), "this configuration's heads read all of these trunks"
    assert sets[-1] == set(plan.parameters)


@pytest.mark.parametrize("trunk", list(TRUNKS)[:-1])
def test_top_down_trains_each_part_of_the_trunk_exactly_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], trunk: str
) -> None:
    plan = plan_of(generated(capsys, base_of(tmp_path, trunk), "top-down"))
    sets = list(trained(plan).values())
    parts = [below(names, "trunk") for names in sets]
    assert parts[0] == set() and all(parts[1:])
    assert sum(map(len, parts)) == len(set().union(*parts)), "no two phases share a tensor of the trunk"
    assert set().union(*parts) == below(plan.parameters, "trunk")
    assert all(names >= below(plan.parameters, "heads") for names in sets)


@pytest.mark.parametrize("trunk", ["test_resnet", "tf_efficientnet_lite0"])
def test_the_norms_of_a_part_that_top_down_trains_train_whole_with_their_statistics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], trunk: str
) -> None:
    phases = build_meta_setup(load_config(generated(capsys, base_of(tmp_path, trunk), "top-down"))).phases
    every_norm = {name.rpartition(".")[0] for name in phases[0].freeze.plan.names.frozen_buffers}
    thawed = set[str]()
    for phase in phases:
        plan = phase.freeze.plan
        norms = every_norm & {name.rpartition(".")[0] for name in plan.names.trainable}
        assert below(plan.names.free_buffers, "trunk") == {f"{name}.{key}" for name in norms for key in STATISTICS}
        assert norms.isdisjoint(plan.held_in_eval)
        thawed |= norms
    assert thawed == every_norm != set()


@pytest.mark.parametrize("trunk", ["test_resnet", "test_vit"])
def test_top_down_takes_the_groups_of_gradual_in_the_same_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], trunk: str
) -> None:
    base = base_of(tmp_path, trunk)
    gradual, top_down = (
        [below(names, "trunk") for names in trained(plan_of(generated(capsys, base, kind))).values()]
        for kind in ("gradual", "top-down")
    )
    assert [set().union(*top_down[: number + 1]) for number in range(len(top_down))] == gradual


@pytest.mark.parametrize("trunk", ["test_resnet", "test_vit", "tf_efficientnet_lite0"])
def test_alternate_trains_heads_and_trunk_in_turn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], trunk: str
) -> None:
    plan = plan_of(generated(capsys, base_of(tmp_path, trunk), "alternate"))
    heads, body, balance = (below(plan.parameters, part) for part in ("heads", "trunk", "balance"))
    assert heads and body and balance
    turns = {"heads": heads | balance, "trunk": body | balance}
    assert trained(plan) == {f"{part}.{number}": turns[part] for number in (1, 2) for part in ("heads", "trunk")}


@pytest.mark.parametrize("trunk", ["test_resnet", "test_vit", "tf_efficientnet_lite0"])
def test_one_at_a_time_trains_each_head_once_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], trunk: str
) -> None:
    plan = plan_of(generated(capsys, base_of(tmp_path, trunk), "one-at-a-time"))
    assert trained(plan) == {task: below(plan.parameters, f"heads.{task}") for task in TINY["tasks"]}
    assert [phase.tasks for phase in plan.phases] == [(task,) for task in TINY["tasks"]]
    assert not any(phase.unreached for phase in plan.phases), "the other heads are frozen by name"


@pytest.mark.parametrize("kind", SCHEDULES)
def test_epochs_are_the_length_of_every_phase(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    for arguments, epochs in ([], 1), (["--epochs", "3"], 3):
        config = load_config(generated(capsys, base_of(tmp_path), kind, *arguments))
        assert {written.config.epochs for written in config.written_phases} == {epochs}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_what_is_generated_takes_everything_but_name_and_phases_from_its_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    base = base_of(tmp_path)
    ours, theirs = (load_config(file).model_dump(mode="json") for file in (base, generated(capsys, base, kind)))
    assert theirs["name"] == f"tiny-{kind}"
    assert {key for key in ours if ours[key] != theirs[key]} == {"name", "phases"}


@pytest.mark.parametrize("kind", ["gradual", "one-at-a-time"])
def test_a_generated_schedule_has_a_real_plan_with_costs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    tasks = {"object": TINY["tasks"]["object"]}
    code = main(["plan", str(generated(capsys, base_of(tmp_path, tasks=tasks, balance={}), kind))])
    said = capsys.readouterr()
    assert (code, said.err) == (0, "")
    assert (
        said.out.count("MFLOP")
        == said.out.count("all-reduce")
        == len(load_config(tmp_path / f"{kind}.yaml").written_phases)
    )


def header_command(file: Path) -> list[str]:
    (line,) = [line for line in file.read_text().splitlines() if line.startswith("# Written by: ")]
    program, *arguments = shlex.split(line.removeprefix("# Written by: "))
    assert program == "mtl"
    return arguments


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_header_names_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    base = base_of(tmp_path)
    file = generated(capsys, base, kind)
    first = file.read_text().splitlines()[0]
    assert first.startswith(f"# {kind}: ")
    assert header_command(file) == ["plan", str(base), "--generate", kind]
    assert "# test_resnet has 5 depth groups." in file.read_text()


def test_the_command_in_the_header_writes_the_same_file_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = generated(capsys, base_of(tmp_path), "alternate", "--epochs", "3", "trunk.options={drop_path_rate: 0.1}")
    assert main(header_command(file)) == 0
    assert capsys.readouterr().out == file.read_text()


def test_a_schedule_for_an_overridden_trunk_plans_as_it_was_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = generated(capsys, base_of(tmp_path), "gradual", "trunk.name=resnet18")
    assert plan_of(file).trunk == "resnet18"


@pytest.mark.parametrize("kind", ["alternate", pytest.param("top-down", marks=pytest.mark.slow)])
def test_a_generated_schedule_trains_with_a_clean_audit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    parts = assemble(load_config(generated(capsys, base_of(tmp_path), kind)), quiet=True)
    report = train(parts, quiet=True).report
    assert report.ok and report.violations == []
    phases = report.to_json()["phases"]
    assert [(phase["name"], phase["completed"]) for phase in phases] == [(phase.name, True) for phase in parts.phases]
    assert len(phases) > 3
    # Each part trained, and its statistics with it.
    assert all(int(count) > 0 for name, count in parts.model.named_buffers() if name.endswith("num_batches_tracked"))
