"""What a step costs, against numbers worked out by hand from the layers of a real forward."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mtl.config import load_config
from mtl.phases.plan import make_plan
from mtl.phases.plan.rehearsal import Cost, rehearse
from mtl.phases.setup import ModelSetup, build_model_setup
from runs import TINY, tiny_config

OBJECT = {"object": TINY["tasks"]["object"]}
# test_resnet on 32 x 32 pixels with one vector head: 2 * kernel * input channels * output channels * output positions.
BY_HAND = {
    "trunk.conv1.0": 2 * 9 * 3 * 16 * 256,
    "trunk.conv1.3": 2 * 9 * 16 * 16 * 256,
    "trunk.conv1.6": 2 * 9 * 16 * 32 * 256,
    "trunk.layer1.0.conv1": 2 * 9 * 32 * 32 * 64,
    "trunk.layer1.0.conv2": 2 * 9 * 32 * 32 * 64,
    "trunk.layer2.0.conv1": 2 * 9 * 32 * 48 * 16,
    "trunk.layer2.0.conv2": 2 * 9 * 48 * 48 * 16,
    "trunk.layer2.0.downsample.1": 2 * 1 * 32 * 48 * 16,
    "trunk.layer3.0.conv1": 2 * 1 * 48 * 48 * 16,
    "trunk.layer3.0.conv2": 2 * 9 * 48 * 48 * 4,
    "trunk.layer3.0.conv3": 2 * 1 * 48 * 192 * 4,
    "trunk.layer3.0.downsample.1": 2 * 1 * 48 * 192 * 4,
    "trunk.layer4.0.conv1": 2 * 9 * 192 * 96 * 1,
    "trunk.layer4.0.conv2": 2 * 9 * 96 * 96 * 1,
    "trunk.layer4.0.downsample.1": 2 * 1 * 192 * 96 * 1,
    "heads.object.out": 2 * 1 * 96 * 10,
}


def model_setup_of(folder: Path, device: str = "meta", **changes: Any) -> ModelSetup:
    phases = changes.pop("phases", [{"name": "all", "epochs": 1}])
    return build_model_setup(load_config(tiny_config(folder, phases=phases, **changes)), device)


def of_layers(model_setup: ModelSetup, tasks: Iterable[str] | None = None) -> dict[str, int]:
    """By layer: the forward's operations on one image, from the shapes that a real forward passes on."""
    counted: dict[str, int] = {}

    def counter(name: str) -> Callable[..., None]:
        def count(layer: nn.Module, _: Any, output: Tensor) -> None:
            if isinstance(layer, nn.Conv2d):
                height, width = layer.kernel_size
                multiplied = height * width * (layer.in_channels // layer.groups)
            else:
                assert isinstance(layer, nn.Linear)
                multiplied = layer.in_features
            counted[name] = counted.get(name, 0) + 2 * multiplied * output[0].numel()

        return count

    layers = [(n, m) for n, m in model_setup.model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [module.register_forward_hook(counter(name)) for name, module in layers]
    model_setup.model.eval()
    with torch.no_grad():
        model_setup.model(model_setup.model.example_inputs(1), None if tasks is None else list(tasks))
    for hook in hooks:
        hook.remove()
    return counted


def cost_of(folder: Path, phase: dict[str, Any], device: str = "meta", **changes: Any) -> Cost:
    model_setup = model_setup_of(folder, device, phases=[{"name": "a", "epochs": 1} | phase], **changes)
    return rehearse(model_setup, model_setup.phases[0])


def test_the_hooks_of_these_tests_count_what_is_written_out_by_hand(tmp_path: Path) -> None:
    assert of_layers(model_setup_of(tmp_path, "cpu", tasks=OBJECT, balance={})) == BY_HAND


def of_enlarging(model_setup: ModelSetup, tasks: Iterable[str]) -> int:
    """What it takes to enlarge the outputs of dense heads: a product for the rows, and one for the columns.

    Their backward costs as much: the matrices do not train.
    """
    size = model_setup.config.data.image_size
    coarse = size // 4
    outputs = sum(model_setup.tasks[task].num_outputs for task in tasks if model_setup.tasks[task].output == "dense")
    return outputs * 2 * (size * coarse * coarse + size * coarse * size)


HEAD = "heads.object.out"
LOWER = ("trunk.conv1", "trunk.layer1", "trunk.layer2")
# The phase, and how many forwards the backward of each layer costs: one for its weight, one for its input.
# A layer below which nothing trains sends no gradient to its input, a frozen one has none of its weight.
BACKWARDS: dict[str, tuple[dict[str, Any], Callable[[str], int]]] = {
    "all but the head is frozen": ({"freeze": ["trunk"]}, lambda name: int(name == HEAD)),
    "nothing is frozen": ({}, lambda name: 1 if name == "trunk.conv1.0" else 2),
    "the first half is frozen": (
        {"freeze": ["trunk.conv1", "trunk.bn1", "trunk.layer1", "trunk.layer2"]},
        lambda name: (
            0 if name.startswith(LOWER) else 1 if name in ("trunk.layer3.0.conv1", "trunk.layer3.0.downsample.1") else 2
        ),
    ),
    "the head is frozen": ({"freeze": ["heads"]}, lambda name: 1 if name in ("trunk.conv1.0", HEAD) else 2),
    "one layer in the middle trains": (
        {"train": ["trunk.layer2"]},
        lambda name: 0 if name.startswith(LOWER[:2]) else 2 if name == "trunk.layer2.0.conv2" else 1,
    ),
}


@pytest.mark.parametrize("case", BACKWARDS)
def test_forward_and_backward_equal_the_numbers_worked_out_by_hand(tmp_path: Path, case: str) -> None:
    phase, times = BACKWARDS[case]
    cost = cost_of(tmp_path, phase, tasks=OBJECT, balance={})
    assert cost.forward_flops == sum(BY_HAND.values())
    assert cost.backward_flops == sum(times(name) * flops for name, flops in BY_HAND.items())


@pytest.mark.parametrize("trunk", ["test_resnet", "tf_efficientnet_lite0", "test_convnext"])
def test_all_heads_and_depthwise_convolutions_are_counted_with_their_groups(tmp_path: Path, trunk: str) -> None:
    real = model_setup_of(tmp_path, "cpu", trunk={"name": trunk})
    layers = of_layers(real)
    assert trunk == "test_resnet" or any(isinstance(m, nn.Conv2d) and m.groups > 1 for m in real.model.modules())
    cost = rehearse(model_setup_of(tmp_path, trunk={"name": trunk}), None)
    forward, stem = sum(layers.values()), next(iter(layers.values()))
    enlarging = of_enlarging(real, real.tasks)
    assert (cost.forward_flops, cost.optimizer_state) == (forward + enlarging, None)
    assert cost.backward_flops == 2 * forward - stem + enlarging, "only the stem has no input to send a gradient to"
    assert 1.9 * forward < cost.backward_flops - enlarging <= 2 * forward


def test_a_phase_of_one_task_pays_for_its_head_alone(tmp_path: Path) -> None:
    real = model_setup_of(tmp_path, "cpu")
    layers, enlarging = of_layers(real, ["depth"]), of_enlarging(real, ["depth"])
    assert {name.split(".")[1] for name in layers if name.startswith("heads.")} == {"depth"}
    cost = cost_of(tmp_path, {"tasks": ["depth"]})
    assert cost.forward_flops == sum(layers.values()) + enlarging
    assert cost.backward_flops == 2 * sum(layers.values()) - layers["trunk.conv1.0"] + enlarging


def test_one_head_may_train_while_the_losses_of_frozen_heads_are_active(tmp_path: Path) -> None:
    cost = cost_of(tmp_path, {"train": ["heads.object"]})
    assert cost.backward_flops == BY_HAND[HEAD]


def test_a_phase_that_only_evaluates_costs_a_forward_alone(tmp_path: Path) -> None:
    model_setup = model_setup_of(tmp_path, phases=[{"name": "a", "evaluate_only": True}], tasks=OBJECT, balance={})
    assert rehearse(model_setup, model_setup.phases[0]) == Cost(sum(BY_HAND.values()), 0, 0)


# Trainable next to a frozen trunk: a weight of 96 x 10 and a bias of 10.
NUMBERS, TENSORS = 970, 2


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ("sgd", 0),
        ({"name": "sgd", "options": {"momentum": 0.9}}, 4 * NUMBERS),
        ("adam", 2 * 4 * NUMBERS + 4 * TENSORS),
        ("adamw", 2 * 4 * NUMBERS + 4 * TENSORS),
        ({"name": "adam", "options": {"amsgrad": True}}, 3 * 4 * NUMBERS + 4 * TENSORS),
    ],
)
def test_optimizer_state_is_the_bytes_worked_out_by_hand(
    tmp_path: Path, optimizer: str | dict[str, Any], expected: int
) -> None:
    phase = {"freeze": ["trunk"], "optimizer": optimizer}
    assert cost_of(tmp_path, phase, tasks=OBJECT, balance={}).optimizer_state == expected


def test_optimizer_state_is_kept_of_every_parameter_that_trains(tmp_path: Path) -> None:
    model_setup = model_setup_of(tmp_path, tasks=OBJECT, balance={})
    parameters = list(model_setup.root.parameters())
    state = rehearse(model_setup, model_setup.phases[0]).optimizer_state
    assert state == 8 * sum(p.numel() for p in parameters) + 4 * len(parameters)


class Looking(Optimizer):
    """An optimizer that looks at values, of which there are none on the meta device."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        del closure
        for group in self.param_groups:
            for parameter in group["params"]:
                if float(parameter.grad.norm()) >= 0:
                    self.state[parameter]["seen"] = torch.zeros_like(parameter)


def test_the_state_of_an_optimizer_that_looks_at_values_is_unknown_on_meta_and_known_on_the_cpu(tmp_path: Path) -> None:
    phase = {"freeze": ["trunk"], "optimizer": f"{__name__}:Looking"}
    on_meta, on_cpu = (cost_of(tmp_path, phase, device, tasks=OBJECT, balance={}) for device in ("meta", "cpu"))
    assert (on_meta.optimizer_state, on_cpu.optimizer_state) == (None, 4 * NUMBERS)


@pytest.mark.parametrize("trunk", ["test_resnet", "test_convnext"])
def test_rehearsals_on_meta_and_on_the_cpu_make_the_same_plan(tmp_path: Path, trunk: str) -> None:
    phases = [{"name": "a", "freeze": ["trunk"], "epochs": 1}, {"name": "b", "freeze": ["trunk@first:50%"], "steps": 2}]
    on_meta, on_cpu = (model_setup_of(tmp_path, d, trunk={"name": trunk}, phases=phases) for d in ("meta", "cpu"))
    assert make_plan(on_meta, 2) == make_plan(on_cpu, 2)


# test_vit on 32 x 32 pixels: 5 tokens of width 64, 6 blocks; two products of 5 x 5 x 64 in each block's attention.
ATTENTION = 6 * 2 * (2 * 5 * 5 * 64)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_attention_is_counted_next_to_the_layers(tmp_path: Path, device: str) -> None:
    changes: dict[str, Any] = {"trunk": {"name": "test_vit"}, "tasks": OBJECT, "balance": {}}
    layers = of_layers(model_setup_of(tmp_path, "cpu", **changes))
    cost = cost_of(tmp_path, {}, device, **changes)
    assert cost.forward_flops == sum(layers.values()) + ATTENTION
    assert cost.backward_flops == 2 * cost.forward_flops - layers["trunk.patch_embed.proj"]


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_no_gradient_is_left_over(tmp_path: Path, device: str) -> None:
    phases: list[dict[str, Any]] = [
        {"name": "a", "freeze": ["trunk"], "epochs": 1},
        {"name": "b", "epochs": 1},
        {"name": "c", "evaluate_only": True},
    ]
    model_setup = model_setup_of(tmp_path, device, phases=phases, tasks=OBJECT, balance={})
    for phase in [None, *model_setup.phases]:
        rehearse(model_setup, phase)
        assert all(parameter.grad is None for parameter in model_setup.root.parameters())


def test_the_phase_that_was_rehearsed_last_stays_enforced(tmp_path: Path) -> None:
    model_setup = model_setup_of(tmp_path, phases=[{"name": "a", "freeze": ["trunk"], "epochs": 1}])
    rehearse(model_setup, model_setup.phases[0])
    assert {name.split(".")[0] for name, p in model_setup.root.named_parameters() if p.requires_grad} == {
        "heads",
        "balance",
    }
    assert not any(module.training for module in model_setup.model.trunk.modules())
    rehearse(model_setup, None)
    assert all(parameter.requires_grad for parameter in model_setup.root.parameters())
    assert all(module.training for module in model_setup.root.modules())
