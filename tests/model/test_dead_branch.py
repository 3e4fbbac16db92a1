"""Parameters that cannot train after frozen zeros: found before training, and nothing else is called so."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from mtl.cli import main
from mtl.config import TrunkConfig
from mtl.freeze import enforce, plan_freeze, trainable_parameters
from mtl.model import MultiTaskModel
from mtl.model.dead_branch import find_dead_branch
from mtl.tasks import Classification, Depth
from mtl.training.run import train
from mtl.training.tracking.messages import warn_of_dead_branches
from runs import small_config, small_parts

SIZE = 32
TASKS = {"depth": Depth(), "object": Classification(3)}


def model_of(trunk: str, **options: Any) -> MultiTaskModel:
    torch.manual_seed(0)
    return MultiTaskModel(TrunkConfig(name=trunk, options=options), TASKS, SIZE)


def found(model: MultiTaskModel, patterns: list[str], moved: tuple[str, ...] = ()) -> tuple[set[str], set[str]]:
    """What is dead, and the zeros in its way."""
    trainable = plan_freeze(model, patterns).names.trainable
    branch = find_dead_branch(model, tuple(TASKS), trainable, moved)
    return (set(), set()) if branch is None else ({*branch.parameters}, {*branch.zeros})


def zeros_in(model: MultiTaskModel) -> set[str]:
    return {name for name, p in model.named_parameters() if not p.any() and not name.endswith("bias")}


# Trunk, its options, what is frozen; each of them has zeros of its own in the last layer of its branches.
KILLED = [
    ("test_resnet", {}, ["type:BatchNorm2d"]),
    ("test_resnet", {}, ["**", "!heads", "!trunk.layer4.0.conv2"]),
    ("test_resnet", {}, ["**.bn2.weight", "**.bn3.weight"]),
    pytest.param("resnet18", {}, ["type:BatchNorm2d"], marks=pytest.mark.slow),
    pytest.param("regnetx_002", {}, ["type:BatchNorm2d", "trunk.stem"], marks=pytest.mark.slow),
    pytest.param("nf_regnet_b0", {}, ["~gain"], marks=pytest.mark.slow),
    ("test_convnext", {"ls_init_value": 0.0}, ["~gamma"]),
]


@pytest.mark.parametrize(("trunk", "options", "patterns"), KILLED)
def test_what_is_found_has_a_gradient_of_zero_in_every_step_and_all_else_trains(
    trunk: str, options: dict[str, Any], patterns: list[str]
) -> None:
    model = model_of(trunk, **options)
    dead, zeros = found(model, patterns)
    assert dead and zeros and zeros <= zeros_in(model)
    plan = plan_freeze(model, patterns)
    assert dead < {*plan.names.trainable} and zeros <= {*plan.names.frozen}
    enforce(model, plan)
    parameters = trainable_parameters(model, plan)
    optimizer = SGD(parameters.values(), lr=1e-3)
    lived = set[str]()
    for _ in range(3):
        optimizer.zero_grad()
        outputs = model(torch.randint(0, 256, (4, SIZE, SIZE, 3), dtype=torch.uint8))
        sum((output * torch.randn_like(output)).sum() for output in outputs.values()).backward()
        lived |= {name for name, p in parameters.items() if p.grad is not None and p.grad.any()}
        optimizer.step()
    assert lived.isdisjoint(dead)
    unreached = {name for name, p in parameters.items() if p.grad is None}
    assert {*parameters} - lived - unreached == dead


def test_each_dead_branch_is_named_with_the_norm_that_kills_it() -> None:
    model = model_of("resnet18")
    branch = [f"trunk.layer2.1.{name}" for name in ("conv1.weight", "bn1.weight", "bn1.bias", "conv2.weight")]
    assert found(model, ["trunk.layer2.1.bn2"]) == ({*branch}, {"trunk.layer2.1.bn2.weight"})
    # The block above is frozen whole, with a norm at zero as well: nothing is dead because of that one.
    assert found(model, ["trunk.layer2.1.bn2", "trunk.layer4"]) == ({*branch}, {"trunk.layer2.1.bn2.weight"})


def test_two_zeros_in_a_row_are_both_named() -> None:
    model = model_of("test_convnext", ls_init_value=0.0)
    block = "trunk.stages.1.blocks.0"
    nn.init.zeros_(model.get_parameter(f"{block}.mlp.fc2.weight"))
    dead, zeros = found(model, [f"{block}.gamma", f"{block}.mlp.fc2.weight"])
    assert zeros == {f"{block}.gamma", f"{block}.mlp.fc2.weight"}
    trained = {name for name, _ in model.named_parameters() if name.startswith(block)} - zeros
    assert dead == trained


def test_a_frozen_head_of_zeros_kills_what_only_its_task_reaches() -> None:
    model = model_of("tf_efficientnet_lite0")
    out = model.heads["object"].get_submodule("out")
    nn.init.zeros_(out.weight)  # type: ignore[arg-type]
    # Segmentation heads read levels below the last convolution.
    assert found(model, ["heads.object"]) == (
        {"trunk.conv_head.weight", "trunk.bn2.weight", "trunk.bn2.bias"},
        {"heads.object.out.weight"},
    )


def test_nothing_is_dead_where_zeros_train_or_have_trained_or_are_no_zeros_or_kill_frozen_parts_only() -> None:
    silent: tuple[set[str], set[str]] = (set(), set())
    model = model_of("resnet18")
    assert found(model, []) == silent
    assert found(model, ["trunk"]) == silent
    assert found(model, ["trunk@first:50%", "heads.depth"]) == silent
    assert found(model, ["trunk", "!type:BatchNorm2d"]) == silent
    assert found(model, ["type:BatchNorm2d"], moved=tuple(zeros_in(model))) == silent
    assert found(model, ["heads", "**.bias"]) == silent
    assert found(model_of("resnet18", zero_init_last=False), ["type:BatchNorm2d"]) == silent
    with torch.no_grad():
        for name in zeros_in(model):
            # As weights that were trained have it: one channel is enough.
            model.get_parameter(name)[0] = 1e-3
    assert found(model, ["type:BatchNorm2d"]) == silent


@pytest.mark.parametrize(
    ("trunk", "patterns"), [("test_vit", ["type:LayerNorm", "~embed"]), ("test_convnext", ["~norm"])]
)
def test_zeros_that_are_added_kill_nothing(trunk: str, patterns: list[str]) -> None:
    model = model_of(trunk)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] in ("bias", "pos_embed", "cls_token"):
                parameter.zero_()
    assert found(model, patterns) == (set(), set())


def test_model_and_random_state_are_left_as_they_were() -> None:
    model = model_of("test_resnet")
    model.trunk.eval()
    model.get_parameter("trunk.bn1.weight").requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [(p.requires_grad, p._version, p.grad) for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert found(model, ["type:BatchNorm2d"])[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [(p.requires_grad, p._version, p.grad) for p in model.parameters()] == flags
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


# --- what is said of it

PHASES: list[dict[str, Any]] = [
    {"name": "norms", "freeze": ["type:BatchNorm2d"], "steps": 2},
    {"name": "all", "freeze": [], "steps": 2},
    {"name": "norms-later", "freeze": ["type:BatchNorm2d"], "steps": 2},
]
WARNING = (
    "norms: 9 trainable tensors (trunk.layer1.0.conv1, trunk.layer1.0.conv2, trunk.layer2.0.conv1,"
    " trunk.layer2.0.conv2 and 5 more) cannot train: gradients there stay zero, since 4 frozen tensors in their way are"
    " zero in every element (trunk.layer1.0.bn2.weight, trunk.layer2.0.bn2.weight, trunk.layer3.0.bn3.weight,"
    " trunk.layer4.0.bn2.weight); leave them out of the freeze or set trunk.options.zero_init_last=false or begin with"
    " trained weights (trunk.weights)"
)


ONE_TASK = {"tasks": {"object": {"type": "classification", "num_classes": 10}}, "balance": {}}


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "cannot train" in record.getMessage()]


def test_a_run_warns_of_it_before_training_and_only_of_phases_that_still_find_zeros(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mtl")
    train(small_parts(tmp_path, phases=PHASES, **ONE_TASK), quiet=True)
    said = [record.getMessage() for record in caplog.records]
    assert warnings_in(caplog) == [WARNING]
    assert said.index(WARNING) < min(number for number, line in enumerate(said) if "epoch 1" in line)


@pytest.mark.parametrize("has_weights", [False, True])
def test_a_run_whose_frozen_norms_are_no_zeros_is_silent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, has_weights: bool
) -> None:
    trunk: dict[str, Any] = {"name": "test_resnet", "options": {"zero_init_last": False}}
    if has_weights:
        torch.save(model_of("test_resnet", zero_init_last=False).trunk.state_dict(), tmp_path / "trained.pth")
        trunk = {"name": "test_resnet", "weights": str(tmp_path / "trained.pth")}
    warn_of_dead_branches(small_parts(tmp_path, phases=PHASES[:1], trunk=trunk, **ONE_TASK))
    assert warnings_in(caplog) == []


def test_phases_that_are_alike_are_warned_of_together_and_remedies_fit_the_zeros(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    turns = [{"repeat": 3, "phases": [{"name": "last", "freeze": ["trunk.layer4.0.bn2"], "steps": 1}]}]
    parts = small_parts(tmp_path, phases=turns, **ONE_TASK)
    nn.init.ones_(parts.model.get_parameter("trunk.layer4.0.bn2.weight"))
    warn_of_dead_branches(parts)
    assert warnings_in(caplog) == []
    nn.init.zeros_(parts.model.get_parameter("trunk.layer4.0.bn2.weight"))
    warn_of_dead_branches(parts)
    (said,) = warnings_in(caplog)
    assert said.startswith(
        "last.1, last.2, last.3: 4 trainable tensors (trunk.layer4.0.conv1, trunk.layer4.0.bn1, trunk.layer4.0.conv2"
    )
    assert (
        "since 1 frozen tensor in their way is zero in every element (trunk.layer4.0.bn2.weight); leave it out" in said
    )


def planned(capsys: pytest.CaptureFixture[str], file: Path, *arguments: str) -> str:
    assert main(["plan", str(file), *arguments]) == 0
    return capsys.readouterr().out


def test_the_plan_says_it_where_initial_values_are_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = small_config(tmp_path, phases=PHASES, **ONE_TASK)
    paragraphs = planned(capsys, file).split("\n\n")
    assert [("  dead " in each) for each in paragraphs] == [True, False, False]
    assert "9 tensors, whose gradient stays zero (trunk.layer1.0.conv1, " in paragraphs[0]
    assert "in their way 4 frozen tensors of zeros (trunk.layer1.0.bn2.weight, " in paragraphs[0]
    dead = [phase["dead"] for phase in json.loads(planned(capsys, file, "--json"))["phases"]]
    assert [len(dead[0]["parameters"]), len(dead[0]["zeros"]), *dead[1:]] == [9, 4, None, None]


def test_the_plan_of_a_trunk_with_weights_leaves_it_to_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trunk = {"name": "test_resnet", "weights": "hub"}
    file = small_config(tmp_path, phases=PHASES[:1], trunk=trunk, **ONE_TASK)
    assert "  dead " not in planned(capsys, file)
