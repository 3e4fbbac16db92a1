"""The plan of a run: the same as what the trainer really does, a partition, and sums that add up."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import nn

from mtl.config import ConfigError, RunConfig, load_config
from mtl.data import Shuffled
from mtl.freeze import enforce
from mtl.model.reachability import reached_parameters
from mtl.optim.optimizers import build_optimizer
from mtl.patterns import select
from mtl.patterns.module_tree import describe
from mtl.phases.active_tasks import resolve_tasks
from mtl.phases.freeze_rules import ResolveContext
from mtl.phases.metrics import RunMetrics
from mtl.phases.plan import Claim, PhasePlan, Plan, Side, make_plan
from mtl.phases.plan.rehearsal import Cost
from mtl.phases.resolve import resolve_phases
from mtl.phases.setup import ModelSetup, build_model_setup
from mtl.training.setup import RunSetup
from runs import TINY, tiny_config, tiny_parts

DENSE = {name: TINY["tasks"][name] for name in ("depth", "normals")}


def plan_of(folder: Path, phases: list[dict[str, Any]], world_size: int = 1, **changes: Any) -> Plan:
    # On the CPU such a small model is rehearsed faster; `test_rehearsal` shows that the plan is the same on meta.
    return make_plan(build_model_setup(load_config(tiny_config(folder, phases=phases, **changes))), world_size)


def is_covered(name: str, modules: Iterable[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


# ---- The plan and the real thing -------------------------------------------------------------------------------------

PHASES: dict[str, list[dict[str, Any]]] = {
    "test_resnet": [
        {"name": "heads", "freeze": ["trunk"], "epochs": 1},
        {"name": "upper", "freeze": ["trunk@first:50%", "heads.object", "type:BatchNorm2d"], "epochs": 1},
        {"name": "rates", "freeze": ["**.bias"], "lr": {"trunk": 1e-3, "heads": 2e-3, "balance": 3e-3}, "steps": 2},
        {"name": "depth", "tasks": ["depth"], "freeze": ["trunk.conv1"], "steps": 3},
        {"name": "end", "evaluate_only": True},
    ],
    "tf_efficientnet_lite0": [
        {"name": "dense", "tasks": ["depth"], "epochs": 1, "optimizer": "sgd"},
        {"name": "decayed", "freeze": ["trunk.blocks.3"], "layer_decay": 0.5, "epochs": 1},
    ],
    "test_vit": [{"name": "all", "freeze": ["trunk.blocks[1:3]", "trunk.pos_embed"], "steps": 2}],
}


def check_against_the_real_thing(parts: RunSetup, index: int) -> None:
    phase, planned = parts.phases[index], parts.plan.phases[index]
    parameters = dict(parts.root.named_parameters())
    enforce(parts.root, phase.freeze.plan)
    parts.root.train()
    assert set(planned.trainable.names) == {name for name, p in parameters.items() if p.requires_grad}
    assert set(planned.frozen.names) == {name for name, p in parameters.items() if not p.requires_grad}
    for side in (planned.trainable, planned.frozen):
        tensors = [parameters[name] for name in side.names]
        assert (side.count, side.parameters) == (len(tensors), sum(tensor.numel() for tensor in tensors))
        assert side.bytes == sum(tensor.nbytes for tensor in tensors)
    assert planned.unreached == phase.freeze.unreached
    modules = {n: module for n, module in parts.root.named_modules() if n.startswith(("trunk", "heads"))}
    held = {name for name, module in modules.items() if not module.training}
    assert held == {name for name in modules if is_covered(name, planned.held_in_eval)}
    if phase.config.evaluate_only:
        assert (planned.optimizer, planned.groups, planned.lr_of) == (None, (), {})
        return
    names = {id(parameter): name for name, parameter in parameters.items()}
    groups = build_optimizer(phase.optim.optimizer, phase.groups).param_groups
    assert [(g.lr, g.weight_decay, g.count, g.parameters) for g in planned.groups] == [
        (g["lr"], g["weight_decay"], len(g["params"]), sum(p.numel() for p in g["params"])) for g in groups
    ]
    assert planned.lr_of == {names[id(p)]: group["lr"] for group in groups for p in group["params"]}


@pytest.mark.parametrize("trunk", PHASES)
def test_the_plan_drawn_without_weights_names_what_the_trainer_really_freezes_trains_and_holds(
    tmp_path: Path, trunk: str
) -> None:
    parts = tiny_parts(tmp_path, trunk={"name": trunk}, phases=PHASES[trunk])
    assert [phase.name for phase in parts.plan.phases] == [phase["name"] for phase in PHASES[trunk]]
    assert parts.plan.parameters == tuple(name for name, _ in parts.root.named_parameters())
    weights = sum(tensor.nbytes for tensor in [*parts.root.parameters(), *parts.root.buffers()])
    for index, planned in enumerate(parts.plan.phases):
        check_against_the_real_thing(parts, index)
        assert planned.memory.weights == weights


# ---- Any list of patterns --------------------------------------------------------------------------------------------

PLAIN = ["trunk", "trunk.layer1", "trunk@first:2", "trunk[-1]", "heads", "heads.object", "**.bias", "type:BatchNorm2d"]
PATTERNS = st.lists(
    st.sampled_from([*PLAIN, "!trunk.layer4", "!heads.depth", "!type:BatchNorm2d", "~conv"]), max_size=5
)
Resolver = Callable[[list[list[str]]], Plan]


@pytest.fixture(scope="module")
def resolver(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Resolver]:
    """One model without weights, and what makes plans of phases with other patterns on it."""
    file = tiny_config(tmp_path_factory.mktemp("plan"))
    model_setup = build_model_setup(load_config(file), "meta")
    reached = reached_parameters(model_setup.model)

    def resolve(freezes: list[list[str]]) -> Plan:
        raw = TINY | {"phases": [{"name": f"p{n}", "freeze": freeze, "steps": 1} for n, freeze in enumerate(freezes)]}
        config = RunConfig.model_validate(raw)
        balance_of = {("phases", index): 0 for index in range(len(freezes))}
        metrics = RunMetrics(config, model_setup.tasks)
        tasks_of = {p.path: resolve_tasks(config, p.config, model_setup.model, reached) for p in config.written_phases}
        context = ResolveContext(
            config, model_setup.root, [], metrics, balance_of, tasks_of, reached, lambda _: Shuffled(40)
        )
        drawn: ModelSetup = replace(model_setup, config=config, phases=resolve_phases(context))
        # What a step costs has tests of its own, and would take most of the time.
        with patch.multiple("mtl.phases.plan.plan", rehearse=lambda *_: Cost(1, 1, 1), _COSTS={}):
            return make_plan(drawn)

    return model_setup.root, resolve


def check_partition(root: nn.Module, plan: Plan, phase: PhasePlan) -> None:
    parameters = dict(root.named_parameters())
    frozen, trainable = set(phase.frozen.names), set(phase.trainable.names)
    assert not frozen & trainable and frozen | trainable == set(parameters) == set(plan.parameters)
    for side in (phase.frozen, phase.trainable):
        assert side.bytes == 4 * side.parameters == 4 * sum(parameters[name].numel() for name in side.names)
        assert side.count == len(side.names) == len(set(side.names))
        assert {name for name in parameters if is_covered(name, side.modules)} == set(side.names)
    assert phase.reduced_bytes == phase.memory.gradients == phase.trainable.bytes
    assert sum(group.count for group in phase.groups) == phase.trainable.count
    assert set(phase.lr_of) == trainable


def check_claims(root: nn.Module, phase: PhasePlan) -> None:
    """Each pattern alone, then the last that matches decides: worked out again here, without the plan's own way."""
    parameters = [name for name, _ in root.named_parameters()]
    every_name = parameters + [name for name, _ in root.named_buffers()]
    alone = [set(select([text.removeprefix("!")], every_name, describe(root)).names) for text in phase.freeze]
    last = {name: max(n for n, names in enumerate(alone) if name in names) for name in every_name if is_in(name, alone)}
    claimed = [{name for name, number in last.items() if number == index} for index in range(len(alone))]
    for claim, text, names in zip(phase.claims, phase.freeze, claimed, strict=True):
        num_parameters = len(names.intersection(parameters))
        assert claim == Claim("freeze", text, num_parameters, len(names) - num_parameters)
        side = phase.trainable if text.startswith("!") else phase.frozen
        assert names.intersection(parameters) <= set(side.names)
    assert sum(claim.parameters for claim in phase.claims) == len(set(last).intersection(parameters))
    assert set(phase.frozen.names) <= set(last), "what no pattern matches trains"


def is_in(name: str, sets: list[set[str]]) -> bool:
    return any(name in each for each in sets)


@settings(max_examples=40)
@given(freezes=st.lists(PATTERNS, min_size=1, max_size=3))
def test_whatever_the_patterns_frozen_and_trained_are_a_partition_and_each_match_is_claimed_once(
    resolver: tuple[nn.Module, Resolver], freezes: list[list[str]]
) -> None:
    root, resolve = resolver
    try:
        plan = resolve(freezes)
    except ConfigError:
        reject()  # nothing trains, or a pattern takes nothing back
    before: PhasePlan | None = None
    for phase in plan.phases:
        check_partition(root, plan, phase)
        check_claims(root, phase)
        was = phase if before is None else before
        assert set(phase.thawed.names) == set(phase.trainable.names) & set(was.frozen.names)
        assert set(phase.newly_frozen.names) == set(phase.frozen.names) & set(was.trainable.names)
        before = phase


def test_the_last_pattern_that_matches_claims_a_name(resolver: tuple[nn.Module, Resolver]) -> None:
    plan = resolver[1]([["trunk.layer2", "!trunk.layer2.0.conv1", "trunk.layer2.0.bn1", "trunk.layer2.0.bn1.bias"]])
    claims = plan.phases[0].claims
    assert [(claim.parameters, claim.buffers) for claim in claims[1:]] == [(1, 0), (1, 3), (1, 0)]
    inside = [name for name in plan.parameters if name.startswith("trunk.layer2.")]
    assert claims[0].parameters == len(inside) - 3
    assert plan.phases[0].frozen.count == len(inside) - 1


# ---- Small cases, written out ----------------------------------------------------------------------------------------


def test_what_thaws_and_what_freezes_between_phases_is_reported(tmp_path: Path) -> None:
    phases = [
        {"name": "a", "freeze": ["trunk.layer1", "heads.normals"], "steps": 1},
        {"name": "b", "freeze": ["trunk.conv1", "trunk.bn1", "heads.object"], "steps": 1},
        {"name": "c", "freeze": ["trunk.conv1", "trunk.bn1", "heads.object"], "steps": 1},
    ]
    plan = plan_of(tmp_path, phases)
    first, second, third = plan.phases
    nothing = Side(0, 0, 0, (), ())
    assert (first.thawed, first.newly_frozen) == (nothing, nothing)
    assert second.thawed.modules == ("trunk.layer1", "heads.normals")
    convolutions, head = (f"trunk.conv1.{number}.weight" for number in (0, 3, 6)), "heads.object.out"
    norms = [name for name in plan.parameters if name.startswith(("trunk.conv1.1.", "trunk.conv1.4.", "trunk.bn1."))]
    assert len(norms) == 6
    written = {*convolutions, *norms, f"{head}.weight", f"{head}.bias"}
    count = 9 * (3 * 16 + 16 * 16 + 16 * 32) + 2 * (16 + 16 + 32) + 96 * 10 + 10
    newly = second.newly_frozen
    assert (newly.count, newly.parameters, newly.bytes) == (len(written), count, 4 * count)
    assert set(newly.names) == written and newly.modules == ("trunk.conv1", "trunk.bn1", "heads.object")
    assert (third.thawed, third.newly_frozen) == (nothing, nothing)


@pytest.mark.parametrize(("world_size", "sent"), [(1, 0), (2, 3880), (4, 5820), (8, 6790)])
def test_a_ring_sends_twice_all_but_one_share_of_the_gradients(tmp_path: Path, world_size: int, sent: int) -> None:
    phases = [{"name": "a", "train": ["heads.object"], "tasks": ["object"], "steps": 1}]
    (phase,) = plan_of(tmp_path, phases, world_size).phases
    assert phase.reduced_bytes == phase.trainable.bytes == 4 * (96 * 10 + 10)
    assert phase.sent_bytes == sent


def test_what_no_dense_head_reads_of_the_trunk_is_named_as_unreached(tmp_path: Path) -> None:
    phases = [{"name": "a", "epochs": 1}]
    (phase,) = plan_of(tmp_path, phases, trunk={"name": "tf_efficientnet_lite0"}, tasks=DENSE).phases
    assert phase.unreached == ("trunk.conv_head.weight", "trunk.bn2.weight", "trunk.bn2.bias")
    assert phase.frozen.names == phase.unreached and phase.claims == ()
    assert not set(phase.unreached) & set(phase.lr_of)


def test_the_heads_of_inactive_tasks_are_named_as_unreached(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, [{"name": "a", "tasks": ["depth"], "epochs": 1}])
    (phase,) = plan.phases
    others = ("heads.segmentation.", "heads.normals.", "heads.object.")
    assert phase.unreached == tuple(name for name in plan.parameters if name.startswith(others))
    assert set(phase.unreached) <= set(phase.frozen.names)


def test_a_warning_about_what_is_unreached_leaves_it_among_what_is_trained(tmp_path: Path) -> None:
    phases = [{"name": "a", "tasks": ["depth"], "epochs": 1}]
    (phase,) = plan_of(tmp_path, phases, unreached="warn").phases
    assert "heads.object.out.bias" in phase.unreached and set(phase.unreached) <= set(phase.trainable.names)


def test_a_phase_that_only_evaluates_has_no_optimizer_no_groups_and_no_backward(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, [{"name": "a", "steps": 1}, {"name": "end", "evaluate_only": True}])
    phase = plan.phases[1]
    assert (phase.optimizer, phase.groups, phase.lr_of, phase.num_steps) == (None, (), {}, 0)
    assert phase.trainable.count == 0 and phase.frozen.names == plan.parameters
    assert phase.newly_frozen == phase.frozen and phase.thawed.count == 0
    assert (phase.memory.gradients, phase.memory.optimizer_state, phase.reduced_bytes, phase.sent_bytes) == (0, 0, 0, 0)
    assert phase.flops.backward == 0 < phase.flops.forward == phase.flops.forward_of_all
    assert phase.held_in_eval == ("trunk", "heads") and phase.unreached == ()


def test_repeated_phases_are_planned_round_by_round(tmp_path: Path) -> None:
    rounds = {
        "repeat": 2,
        "phases": [{"name": "h", "freeze": ["trunk"], "steps": 1}, {"name": "t", "freeze": ["heads"], "steps": 2}],
    }
    plan = plan_of(tmp_path, [rounds])
    assert [(phase.name, phase.num_steps) for phase in plan.phases] == [("h.1", 1), ("t.1", 2), ("h.2", 1), ("t.2", 2)]
    nothing = Side(0, 0, 0, (), ())
    first, second, third, fourth = plan.phases
    assert third == replace(first, name="h.2", thawed=third.thawed, newly_frozen=third.newly_frozen)
    assert (first.thawed, first.newly_frozen) == (nothing, nothing)
    assert (third.thawed.modules, third.newly_frozen.modules) == (("heads",), ("trunk",))
    assert fourth == replace(second, name="t.2")


def test_a_phase_that_freezes_saves_the_share_of_operations_that_it_leaves_out(tmp_path: Path) -> None:
    phases = [{"name": "a", "freeze": ["trunk"], "steps": 1}, {"name": "b", "steps": 1}]
    first, second = plan_of(tmp_path, phases).phases
    flops = first.flops
    assert flops.saved == 1 - (flops.forward + flops.backward) / (flops.forward_of_all + flops.backward_of_all)
    assert 0 < flops.saved < 1 and flops.backward < second.flops.backward and second.flops.saved == 0


# ---- Plain data ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [False, True])
def test_the_plan_as_plain_data_has_the_keys_that_the_design_promises(tmp_path: Path, names: bool) -> None:
    plan = plan_of(tmp_path, [*TINY["phases"], {"name": "end", "evaluate_only": True}])
    plain = json.loads(json.dumps(plan.to_json(names)))
    assert [phase["name"] for phase in plain["phases"]] == ["warm-heads", "finetune", "end"]
    for written, phase in zip(plain["phases"], plan.phases, strict=True):
        assert written["reduced_bytes"] == phase.reduced_bytes
        assert written["memory"].keys() == {"weights", "gradients", "optimizer_state", "average"}
        assert [(g["lr"], g["count"]) for g in written["optimizer_groups"]] == [(g.lr, g.count) for g in phase.groups]
        for key, side in (("frozen", phase.frozen), ("trainable", phase.trainable)):
            assert (written[key]["count"], written[key]["bytes"]) == (side.count, side.bytes)
            assert written[key].get("names") == (list(side.names) if names else None)
        assert written.get("lr_of") == (phase.lr_of if names else None)
        assert all(("names" in written[key]) == names for key in ("thawed", "newly_frozen"))


def test_an_average_and_what_no_task_reaches_are_counted_as_they_are(tmp_path: Path) -> None:
    phases = [{"name": "a", "tasks": ["depth"], "steps": 1}]
    plain, averaged, warned = (
        plan_of(tmp_path, phases, **changes).phases[0]
        for changes in ({}, {"optim": {"ema_decay": 0.9}}, {"unreached": "warn"})
    )
    assert (plain.memory.average, averaged.memory.average) == (0, averaged.trainable.bytes)
    # What is not frozen but receives no gradient costs no gradient, state or traffic.
    assert warned.trainable.bytes > plain.trainable.bytes
    assert warned.memory == plain.memory and warned.reduced_bytes == plain.reduced_bytes == plain.trainable.bytes


def test_a_method_that_looks_at_the_losses_again_costs_another_forward(tmp_path: Path) -> None:
    phases = [{"name": "a", "steps": 1}]
    once, twice = (plan_of(tmp_path, phases, balance={"method": m}).phases[0].flops for m in ("mean", "famo"))
    assert (twice.forward, twice.backward) == (2 * once.forward, once.backward)


def test_an_evaluation_in_between_thaws_and_freezes_nothing(tmp_path: Path) -> None:
    frozen = {"freeze": ["trunk"], "steps": 1}
    phases = [{"name": "a", **frozen}, {"name": "look", "evaluate_only": True}, {"name": "b", **frozen}]
    last = plan_of(tmp_path, phases).phases[2]
    assert (last.thawed.count, last.newly_frozen.count) == (0, 0)


def test_train_is_reported_in_the_users_words(tmp_path: Path) -> None:
    phase = plan_of(tmp_path, [{"name": "a", "train": ["heads.depth", "balance"], "steps": 1}]).phases[0]
    assert (phase.freeze, phase.train) == ((), ("heads.depth, balance",))
    assert [(claim.key, claim.parameters) for claim in phase.claims] == [("train", phase.frozen.count)]
