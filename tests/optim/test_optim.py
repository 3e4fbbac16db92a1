"""The optimizer of a phase: rates, decay and groups as tables; which there are, and that they are torch's own."""

from __future__ import annotations

import importlib
import re
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.optim import Optimizer

from mtl.config import SettingError
from mtl.config.optim import OptimizerConfig
from mtl.freeze import enforce, plan_freeze, trainable_parameters
from mtl.optim.optimizers import (
    UncoveredError,
    build_optimizer,
    by_pattern,
    group_parameters,
    is_decayed,
    layer_factors,
    optimizer_names,
    try_out,
)
from mtl.patterns import PatternError
from mtl.patterns.module_tree import depth_groups, depths, describe

NAMES = ["trunk.weight", "trunk.bias", "head.weight", "head.bias"]


def tiny() -> nn.Module:
    return nn.Sequential(OrderedDict(trunk=nn.Linear(2, 2), head=nn.Linear(2, 1)))


def groups_of(model: nn.Module, lr: float = 0.1, decay: float = 0.0) -> list[dict[str, Any]]:
    """One group with all parameters."""
    return [{"params": list(model.parameters()), "lr": lr, "weight_decay": decay}]


def train(model: nn.Module, optimizer: Optimizer, num_steps: int = 1) -> None:
    generator = torch.Generator().manual_seed(7)
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(torch.randn(4, 2, generator=generator)).square().sum().backward()
        optimizer.step()


def held(model: nn.Module, freeze: list[str]) -> list[str]:
    """Names of the parameters in the optimizer of a phase with this freeze, one for each time that it holds them."""
    plan = plan_freeze(model, freeze)
    enforce(model, plan)
    parameters = trainable_parameters(model, plan)
    groups = group_parameters(parameters, dict.fromkeys(parameters, 0.1), {})
    optimizer = build_optimizer(OptimizerConfig(), groups)
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    return sorted(name_of[id(parameter)] for group in optimizer.param_groups for parameter in group["params"])


def table_of(groups: list[dict[str, Any]], parameters: Mapping[str, Tensor]) -> list[tuple[list[str], float, float]]:
    """Of every group the names of its parameters, its rate, its decay."""
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    return [([name_of[id(p)] for p in group["params"]], group["lr"], group["weight_decay"]) for group in groups]


# --- numbers by pattern


@pytest.mark.parametrize(
    ("value", "names", "expected"),
    [
        (0.1, NAMES, {"trunk.weight": 0.1, "trunk.bias": 0.1, "head.weight": 0.1, "head.bias": 0.1}),
        (0.1, ["head.bias"], {"head.bias": 0.1}),
        (0.1, [], {}),
        ({"**": 0.1, "head": 0.2}, NAMES[1:], {"trunk.bias": 0.1, "head.weight": 0.2, "head.bias": 0.2}),
        ({"head": 0.2, "**": 0.1}, NAMES[2:], {"head.weight": 0.1, "head.bias": 0.1}),
        ({"trunk": 0.1, "head": 0.2, "**.bias": 0.3}, NAMES, dict(zip(NAMES, [0.1, 0.3, 0.2, 0.3], strict=True))),
        ({"**.bias": 0.3, "trunk": 0.1, "head": 0.2}, NAMES, dict(zip(NAMES, [0.1, 0.1, 0.2, 0.2], strict=True))),
        ({"trunk": 0.1, "head": 0.2}, ["head.bias"], {"head.bias": 0.2}),
        ({"trunk": 0.0, "head": 0.2}, ["trunk.bias"], {"trunk.bias": 0.0}),
    ],
    ids=["one", "few", "none", "last", "last is all", "three", "three turned", "other frozen", "zero is a number"],
)
def test_the_number_of_each_parameter_is_this_table(
    value: float | dict[str, float], names: list[str], expected: dict[str, float]
) -> None:
    assert by_pattern(value, names, NAMES) == expected


def test_patterns_that_need_the_module_tree_are_read_with_it() -> None:
    tree = describe(tiny())
    table = by_pattern({"type:Linear": 0.1, "@last:1": 0.2}, NAMES, NAMES, tree)
    assert table == dict(zip(NAMES, [0.1, 0.1, 0.2, 0.2], strict=True))


def test_otherwise_holds_for_what_a_table_does_not_name_and_adds_no_names() -> None:
    names = ["head.weight", "balance.weights"]
    otherwise = {"balance.weights": 0.5, "head.weight": 0.9, "trunk.weight": 0.9}
    assert by_pattern({"head": 0.1}, names, names, otherwise=otherwise) == {"head.weight": 0.1, "balance.weights": 0.5}
    assert by_pattern({"**": 0.1}, names, names, otherwise=otherwise) == {"head.weight": 0.1, "balance.weights": 0.1}
    table = by_pattern({"head": 0.1, "balance": 0.2}, names, names, otherwise=otherwise)
    assert table == {"head.weight": 0.1, "balance.weights": 0.2}


def test_a_table_that_leaves_a_parameter_uncovered_is_refused_with_an_example() -> None:
    with pytest.raises(UncoveredError, match=r"no pattern covers 2 trainable parameters, such as trunk\.weight;"):
        by_pattern({"head": 0.1}, NAMES, NAMES)
    with pytest.raises(UncoveredError, match=r"no pattern covers 1 trainable parameters, such as trunk\.bias;"):
        by_pattern({"head": 0.1}, NAMES, NAMES, otherwise={"trunk.weight": 0.3})


def test_a_number_for_nothing_is_refused_and_its_place_named() -> None:
    with pytest.raises(PatternError, match=r"pattern 'heads' matches nothing \(nearest: head") as caught:
        by_pattern({"**": 0.1, "heads": 0.2}, NAMES, NAMES)
    assert caught.value.index == 1


def test_a_pattern_that_takes_back_is_refused_and_its_place_named() -> None:
    with pytest.raises(PatternError, match=r"'!head' starts with !, which cannot undo a number") as caught:
        by_pattern({"**": 0.1, "!head": 0.2}, NAMES, NAMES)
    assert caught.value.index == 1


# --- rates by depth, decay, groups


def test_the_layer_factors_of_three_groups_are_these() -> None:
    depths = {"stem.weight": 0, "stem.bias": 0, "block.weight": 1, "norm.weight": 2}
    expected = {"stem.weight": 0.125, "stem.bias": 0.125, "block.weight": 0.25, "norm.weight": 0.5}
    assert layer_factors(0.5, depths) == expected
    assert layer_factors(1.0, depths) == dict.fromkeys(expected, 1.0)
    assert layer_factors(0.5, {}) == {}


def test_layer_factors_of_a_timm_model_rise_from_input_to_output_and_cover_it() -> None:
    model = timm.create_model("test_vit", num_classes=0)
    groups = depth_groups(model)
    factors = layer_factors(0.75, depths(model))
    assert factors.keys() >= dict(model.named_parameters()).keys()
    by_group = [{factors[name] for name in group} for group in groups]
    assert all(len(each) == 1 for each in by_group)
    factors_up = [each.pop() for each in by_group]
    assert len(factors_up) >= 3
    assert all(below < above for below, above in pairwise(factors_up))
    assert factors_up[-1] == 0.75
    assert (factors["patch_embed.proj.weight"], factors["norm.weight"]) == (factors_up[0], factors_up[-1])


def test_layer_factors_are_those_of_timm_one_layer_further_from_the_heads() -> None:
    # timm's own groups of a model without a head give the topmost group 1: nothing lies above it.
    model = timm.create_model("test_vit", num_classes=0)
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = param_groups_layer_decay(model, layer_decay=0.65)
    of_timm = {name_of[id(parameter)]: group["lr_scale"] for group in groups for parameter in group["params"]}
    factors = {name: factor for name, factor in layer_factors(0.65, depths(model)).items() if name in of_timm}
    assert factors == pytest.approx({name: 0.65 * scale for name, scale in of_timm.items()}, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "shape", "excluded", "expected"),
    [
        ("conv.weight", (2, 3, 1, 1), [], True),
        ("fc.weight", (2, 3), [], True),
        ("fc.weight", (1, 1), [], True),
        ("norm.weight", (2,), [], False),
        ("fc.bias", (1,), [], False),
        ("log_variance", (), [], False),
        ("trunk.pos_embed", (1, 4, 8), ["trunk.pos_embed"], False),
        ("trunk.pos_embed", (1, 4, 8), ["pos_embed"], True),
        ("trunk.pos_embed_net.weight", (4, 8), ["trunk.pos_embed"], True),
        ("trunk.blocks.1.table", (4, 8), ["other", "trunk.blocks.*.table"], False),
        ("trunk.blocks.1.weight", (4, 8), ["other", "trunk.blocks.*.table"], True),
        ("trunk.Table", (4, 8), ["trunk.table"], True),
    ],
)
def test_what_is_decayed_is_this_table(name: str, shape: tuple[int, ...], excluded: list[str], expected: bool) -> None:
    assert is_decayed(name, torch.zeros(shape), excluded) is expected


def test_parameters_of_one_rate_and_decay_share_a_group() -> None:
    parameters = dict(tiny().named_parameters())
    lr_of = {"trunk.weight": 0.1, "trunk.bias": 0.1, "head.weight": 0.2, "head.bias": 0.1, "frozen": 9.0}
    decay_of = {"trunk.weight": 0.3, "head.weight": 0.3, "frozen": 9.0}
    assert table_of(group_parameters(parameters, lr_of, decay_of), parameters) == [
        (["trunk.weight"], 0.1, 0.3),
        (["trunk.bias", "head.bias"], 0.1, 0.0),
        (["head.weight"], 0.2, 0.3),
    ]
    assert group_parameters({}, lr_of, decay_of) == []


def test_decay_pulls_weights_towards_zero_and_leaves_biases() -> None:
    model = tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)
    parameters = dict(model.named_parameters())
    decay_of = {name: 0.5 for name, parameter in parameters.items() if is_decayed(name, parameter, [])}
    build_optimizer(OptimizerConfig(), group_parameters(parameters, dict.fromkeys(parameters, 0.1), decay_of)).step()
    # AdamW: w <- w (1 - lr decay); a gradient of zero adds nothing.
    found = {name: parameter.unique().tolist() for name, parameter in parameters.items()}
    assert found == dict(zip(NAMES, [pytest.approx([0.95]), [1.0], pytest.approx([0.95]), [1.0]], strict=True))


@pytest.mark.parametrize(
    ("freeze", "expected"),
    [
        ([], ["head.bias", "head.weight", "trunk.bias", "trunk.weight"]),
        (["trunk"], ["head.bias", "head.weight"]),
        (["**.bias"], ["head.weight", "trunk.weight"]),
        (["**", "!head.bias"], ["head.bias"]),
    ],
)
def test_the_optimizer_holds_exactly_what_is_trained_each_once(freeze: list[str], expected: list[str]) -> None:
    model = tiny()
    assert held(model, freeze) == expected
    assert sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad) == expected


def test_a_tied_tensor_is_held_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    assert held(model, []) == ["a.bias", "a.weight", "b.bias"]


# --- the optimizer itself


@pytest.mark.parametrize("name", [*sorted(optimizer_names()), "AdamW", "SGD"])
def test_every_optimizer_steps_to_finite_results(name: str) -> None:
    model = tiny()
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = build_optimizer(OptimizerConfig(name=name), groups_of(model, lr=0.01))
    assert type(optimizer).__name__.lower() == name.lower()
    assert [group["lr"] for group in optimizer.param_groups] == [0.01]
    train(model, optimizer, 3)
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert parameter.isfinite().all()
        assert not torch.equal(parameter, old)


def test_the_well_known_optimizers_are_there_and_those_that_do_not_fit_the_loop_are_not() -> None:
    names = optimizer_names()
    assert names.items() >= {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW", "rmsprop": "RMSprop"}.items()
    assert not {"optimizer", "lbfgs", "sparseadam", "muon"} & names.keys()


def test_the_kernel_that_cannot_step_what_is_thawed_next_to_momentum_is_refused() -> None:
    model = tiny()
    options: dict[str, Any] = {"momentum": 0.9, "fused": True}
    with pytest.raises(SettingError, match=r"optimizer\.options: torch's fused SGD fails .* leave out fused"):
        build_optimizer(OptimizerConfig(name="sgd", options=options), groups_of(model, 0.05, 0.3))


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("adamw", torch.optim.AdamW, {}),
        ("adamw", torch.optim.AdamW, {"betas": (0.8, 0.99), "eps": 1e-6, "amsgrad": True}),
        ("adam", torch.optim.Adam, {}),
        ("sgd", torch.optim.SGD, {}),
        ("sgd", torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    ],
)
def test_steps_equal_those_of_torchs_own_to_the_bit(name: str, kind: Any, options: dict[str, Any]) -> None:
    ours, theirs = tiny(), tiny()
    theirs.load_state_dict(ours.state_dict())
    train(ours, build_optimizer(OptimizerConfig(name=name, options=options), groups_of(ours, 0.05, 0.3)), 20)
    train(theirs, kind(theirs.parameters(), lr=0.05, weight_decay=0.3, fused="momentum" not in options, **options), 20)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one.view(torch.int32), other.view(torch.int32))


def test_options_are_passed_on_and_every_group_keeps_its_own_rate_and_decay() -> None:
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    groups = [{"params": [a], "lr": 0.1, "weight_decay": 0.0}, {"params": [b], "lr": 0.4, "weight_decay": 0.2}]
    config = OptimizerConfig(name="sgd", options={"momentum": 0.7, "nesterov": True})
    found = [(g["lr"], g["weight_decay"], g["momentum"]) for g in build_optimizer(config, groups).param_groups]
    assert found == [(0.1, 0.0, 0.7), (0.4, 0.2, 0.7)]


@pytest.mark.parametrize(
    ("name", "options", "fused", "foreach"),
    [
        ("adamw", {}, True, None),
        ("adamw", {"foreach": False}, None, False),
        ("adamw", {"fused": False}, False, None),
        ("rmsprop", {}, None, True),
    ],
)
def test_tensors_are_stepped_in_one_kernel_or_together_unless_an_option_says_otherwise(
    name: str, options: dict[str, Any], fused: bool | None, foreach: bool | None
) -> None:
    group = build_optimizer(OptimizerConfig(name=name, options=options), groups_of(tiny())).param_groups[0]
    assert (group.get("fused"), group["foreach"]) == (fused, foreach)


def test_building_and_stepping_do_not_write_into_the_groups_that_were_given() -> None:
    model = tiny()
    groups = groups_of(model)
    optimizer = build_optimizer(OptimizerConfig(), groups)
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, optimizer, 2)
    [given] = groups
    assert set(given) == {"params", "lr", "weight_decay"}
    assert (given["lr"], given["weight_decay"], len(given["params"])) == (0.1, 0.0, 4)


@pytest.mark.parametrize("key", ["params", "lr", "weight_decay"])
def test_an_option_with_a_key_of_its_own_is_refused(key: str) -> None:
    config = OptimizerConfig(options={key: 0.1})
    with pytest.raises(SettingError, match=f"^optimizer.options: '{key}' has a key of its own"):
        build_optimizer(config, groups_of(tiny()))


@pytest.mark.parametrize("options", [{"momentumm": 0.9}, {"momentum": -1.0}, {"nesterov": True}])
def test_wrong_options_are_refused_with_those_that_it_takes(options: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=r"^optimizer\.options: sgd takes the options momentum, dampening, nest"):
        build_optimizer(OptimizerConfig(name="sgd", options=options), groups_of(tiny()))


def test_decay_for_an_optimizer_that_takes_none_is_refused() -> None:
    with pytest.raises(SettingError, match=r"^optimizer\.name: rprop takes no weight decay; set weight_decay to 0"):
        build_optimizer(OptimizerConfig(name="rprop"), groups_of(tiny(), decay=0.1))


def test_an_unknown_optimizer_is_refused_with_the_nearest_and_all_there_are() -> None:
    with pytest.raises(SettingError, match=r"^optimizer\.name: no optimizer 'adamv'; nearest: adam") as caught:
        build_optimizer(OptimizerConfig(name="adamv"), groups_of(tiny()))
    assert all(re.search(rf"\b{name}\b", caught.value.message) for name in optimizer_names())
    assert "package.module:Name" in caught.value.message


# --- one's own


OWN = """
import torch

class Halves(torch.optim.Optimizer):
    def __init__(self, params, lr=1.0, share=0.5):
        super().__init__(params, {"lr": lr, "share": share})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(group["share"])

class Eager(torch.optim.SGD):
    def __init__(self, params, **options):
        super().__init__(params, **options)

class NoOptimizer:
    pass
"""


@pytest.fixture
def own_module(tmp_path: Path) -> Iterator[str]:
    """A module in the working directory."""
    (tmp_path / "own_optimizers.py").write_text(OWN)
    importlib.invalidate_caches()
    yield "own_optimizers"
    sys.modules.pop("own_optimizers", None)


@pytest.mark.parametrize(("options", "expected"), [({}, 0.5), ({"share": 0.25}, 0.25)])
def test_an_optimizer_of_ones_own_steps(own_module: str, options: dict[str, Any], expected: float) -> None:
    parameter = nn.Parameter(torch.ones(3))
    groups = [{"params": [parameter], "lr": 0.3, "weight_decay": 0.0}]
    optimizer = build_optimizer(OptimizerConfig(name=f"{own_module}:Halves", options=options), groups)
    assert optimizer.param_groups[0]["lr"] == 0.3
    optimizer.step()
    assert parameter.tolist() == [expected] * 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_optimizer:Halves", r"'own_optimizer' cannot be imported: No module named 'own_optimizer'"),
        ("own_optimizers:Halfs", r"own_optimizers has no 'Halfs'; nearest: Halves"),
        ("own_optimizers:NoOptimizer", r"own_optimizers:NoOptimizer is no subclass of torch\.optim\.\S*Optimizer"),
        ("own_optimizers:torch", r"own_optimizers:torch is no subclass of"),
    ],
)
def test_an_optimizer_of_ones_own_that_cannot_be_had_is_refused(own_module: str, name: str, message: str) -> None:
    assert own_module
    with pytest.raises(SettingError, match=f"^optimizer.name: {message}"):
        build_optimizer(OptimizerConfig(name=name), groups_of(tiny()))


@pytest.mark.parametrize(
    ("body", "key", "message"),
    [
        ("def __init__(self, params, weight_decay=0): ...", "optimizer.name", "takes no lr, which every phase"),
        ("@abstractmethod\n    def more(self): ...", "optimizer.name", "is abstract: it lacks more"),
        (
            "def __init__(self, params, lr): 1 / 0",
            "optimizer.options",
            r"takes the options none: ZeroDiv.*own_bad\.py:5",
        ),
        (
            "def __init__(self, params, lr, size): ...",
            "optimizer.options",
            r"takes the options size: TypeError: .*missing 1 required positional argument: 'size'",
        ),
        (
            "def __init__(self, params, lr): super().__init__(params, {'lr': lr})",
            "optimizer.options",
            "cannot step on cpu: NotImplementedError",
        ),
        (
            "def __init__(self, params, lr): super().__init__(params, {'lr': lr})\n    def step(self): 1 / 0",
            "optimizer.options",
            r"cannot step on cpu: ZeroDivisionError: .* \(.*own_bad\.py:6\)",
        ),
    ],
)
def test_a_class_of_ones_own_that_does_not_work_is_reported_at_its_key(
    own_module: str, tmp_path: Path, body: str, key: str, message: str
) -> None:
    assert own_module
    head = "from abc import ABC, abstractmethod\nfrom torch.optim import Optimizer\n\nclass Bad(Optimizer, ABC):\n    "
    (tmp_path / "own_bad.py").write_text(head + body + "\n")
    try:
        with pytest.raises(SettingError, match=message) as caught:
            try_out(OptimizerConfig(name="own_bad:Bad"), torch.device("cpu"))
    finally:
        sys.modules.pop("own_bad", None)
    assert caught.value.key == key and "\n" not in caught.value.message


def test_ones_own_that_takes_no_decay_or_other_options_is_refused(own_module: str) -> None:
    name = f"{own_module}:Halves"
    with pytest.raises(SettingError, match=r"^optimizer\.name: own_optimizers:Halves takes no weight decay"):
        build_optimizer(OptimizerConfig(name=name), groups_of(tiny(), decay=0.1))
    with pytest.raises(SettingError, match=r"^optimizer\.options: own_optimizers:Halves takes the options share: "):
        build_optimizer(OptimizerConfig(name=name, options={"part": 0.1}), groups_of(tiny()))


def test_ones_own_that_passes_all_options_on_takes_decay(own_module: str) -> None:
    config = OptimizerConfig(name=f"{own_module}:Eager", options={"momentum": 0.9})
    group = build_optimizer(config, groups_of(tiny(), decay=0.1)).param_groups[0]
    assert (group["lr"], group["weight_decay"], group["momentum"]) == (0.1, 0.1, 0.9)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adamw", {"capturable": True}, r"adamw cannot step on cpu: .*capturable"),
        ("adafactor", {"eps": [1, 2, 3]}, r"adafactor cannot step on cpu: too many values"),
        ("adamw", {"betas": [0.9]}, r"adamw takes the options .*: list index out of range"),
        ("adamw", {"differentiable": True}, "differentiable is for steps that are differentiated"),
    ],
)
def test_options_that_fail_only_in_a_step_are_found_by_trying(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message) as caught:
        try_out(OptimizerConfig(name=name, options=options), torch.device("cpu"))
    assert caught.value.key == "optimizer.options"


@pytest.mark.parametrize("name", sorted(optimizer_names()))
def test_every_optimizer_steps_when_tried(name: str) -> None:
    try_out(OptimizerConfig(name=name), torch.device("cpu"))
