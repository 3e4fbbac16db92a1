"""Planted faults, each of which the audit names exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from audit_loops import (
    Normed,
    Tiny,
    X,
    found,
    freeze_by_hand,
    hazards,
    only,
    run,
    silent,
    train,
    trainable,
    write_in_place,
    write_numpy_alias,
    write_smallest_bit,
)
from mtl.audit import AuditError, GradientAudit, Report

# --- planted: written elsewhere


def write_data(weight: nn.Parameter) -> None:
    weight.data.add_(1)


def assign_data(weight: nn.Parameter) -> None:
    weight.data = weight.data + 1


def flip_sign_of_zero(weight: nn.Parameter) -> None:
    before = weight.detach().clone()
    with torch.no_grad():
        weight[1, 1] = -0.0
    assert torch.equal(weight, before), "a comparison of values must not see it"


def permute_elements(weight: nn.Parameter) -> None:
    before = weight.detach().flatten().sort().values
    with torch.no_grad():
        weight.copy_(weight.flip(0))
    assert torch.equal(weight.detach().flatten().sort().values, before)


def write_nan(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight[0, 0] = torch.nan


@pytest.mark.parametrize(
    ("write", "words", "max_abs"),
    [
        (write_data, "written past torch's version counter (.data, a numpy alias", 1.0),
        (assign_data, "its data was replaced (.data = ..., .to(), .half())", 1.0),
        (write_in_place, "written outside the watched optimizers (load_state_dict, re-initialisation", 3.0),
        (write_numpy_alias, "written past torch's version counter (.data, a numpy alias", 1.0),
        (write_smallest_bit, "written outside the watched optimizers", 2.0**-23),
        (flip_sign_of_zero, "only the sign of zeros changed", 0.0),
        (permute_elements, "its elements were permuted in place", 2.0),
        (write_nan, "NaN was written", math.nan),
    ],
)
def test_a_write_to_a_frozen_parameter_is_named(
    write: Callable[[nn.Parameter], None], words: str, max_abs: float
) -> None:
    model = Tiny()
    report = run(model, after_step={3: lambda: write(model.trunk.weight)})
    violation = only(report)
    assert found(report) == [("param_changed", "trunk.weight", "frozen", 3)]
    assert words in violation.cause
    assert (violation.since, violation.max_abs) == (2, pytest.approx(max_abs, nan_ok=True))
    assert violation.detail == "its bytes differ from the original ones"


@pytest.mark.parametrize("write", [write_in_place, assign_data, flip_sign_of_zero, permute_elements])
def test_a_write_that_leaves_a_sign_is_named_with_its_own_step(write: Callable[[nn.Parameter], None]) -> None:
    model = Tiny()
    assert found(run(model, num_steps=5, after_step={2: lambda: write(model.trunk.weight)})) == [
        ("param_changed", "trunk.weight", "frozen", 2)
    ]


@pytest.mark.parametrize("write", [write_numpy_alias, write_data])
def test_a_write_that_leaves_no_sign_is_found_when_the_bytes_are_verified(
    write: Callable[[nn.Parameter], None],
) -> None:
    model = Tiny()
    weight = model.trunk.weight
    audit = GradientAudit(model, ["trunk"], policy="collect")
    with audit.phase("frozen"):
        train(audit, model, [], 1)
        version, address = weight._version, weight.data_ptr()
        write(weight)
        assert (weight._version, weight.data_ptr()) == (version, address)
        assert audit.report.violations == []
        audit.verify()
        assert found(audit.report) == [("param_changed", "trunk.weight", "frozen", 1)]
        train(audit, model, [], 1)
    assert len(audit.report.violations) == 1


def test_a_write_that_leaves_no_sign_is_found_at_the_end_of_the_phase() -> None:
    model = Tiny()
    audit = GradientAudit(model, ["trunk"])
    with (
        pytest.raises(AuditError, match=r"phase 'last', step 0, trunk\.weight: param_changed: its bytes differ"),
        audit.phase("last"),
    ):
        write_numpy_alias(model.trunk.weight)
    assert not audit.report.phases[0].completed


def test_load_state_dict_is_named_as_a_write_outside_the_optimizers() -> None:
    model = Tiny()
    other = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    report = run(model, after_step={2: lambda: model.load_state_dict(other)})
    assert found(report) == [("param_changed", "trunk.weight", "frozen", 2)]
    assert "load_state_dict" in only(report).cause


def test_an_optimizer_that_the_audit_does_not_know_is_named_as_one_not_watched() -> None:
    model = Tiny()
    stranger = SGD([model.trunk.weight], lr=0.1)

    def step() -> None:
        model.trunk.weight.grad = torch.ones(2, 2)
        stranger.step()
        stranger.zero_grad()

    report = run(model, after_step={1: step})
    assert found(report) == [("param_changed", "trunk.weight", "frozen", 1)]
    assert "an optimizer not watched" in only(report).cause


NAMES = ["trunk.weight", "trunk.narrow", "trunk.wide", "trunk.count"]


@given(st.sampled_from(NAMES), st.data())
@settings(derandomize=True, database=None, max_examples=50)
def test_any_single_bit_of_any_frozen_tensor_is_missed_by_no_proof(name: str, data: st.DataObject) -> None:
    model = Tiny()
    model.trunk.register_buffer("narrow", torch.tensor([1.5, -2.0, 0.0], dtype=torch.bfloat16))
    model.trunk.register_buffer("wide", torch.tensor(0.1, dtype=torch.float64), persistent=False)
    model.trunk.register_buffer("count", torch.arange(3))
    tensor = getattr(model.trunk, name.removeprefix("trunk.")).detach()
    raw = tensor.reshape(-1).view(torch.uint8).numpy()
    place = data.draw(st.integers(0, 8 * len(raw) - 1))
    audit = GradientAudit(model, ["trunk"], policy="collect")
    with audit.phase("frozen"):
        audit.verify()
        assert audit.report.violations == []
        raw[place // 8] ^= 1 << place % 8
    assert [violation.name for violation in audit.report.violations] == [name]


# --- planted: moved by an optimizer


def test_weight_decay_on_a_zero_gradient_is_named() -> None:
    model = Tiny()
    model.trunk.requires_grad_(True)
    optimizer = SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    train_once_then_freeze_carelessly(model, optimizer, set_to_none=False)
    report = collect(model, optimizer)
    assert found(report) == [
        ("grad_present", "trunk.weight", "frozen", 0),
        ("in_optimizer", "trunk.weight", "frozen", 0),
        ("param_changed", "trunk.weight", "frozen", 1),
    ]
    assert report.violations[2].cause.startswith("weight decay moves a parameter whose gradient is zero")


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda parameters: SGD(parameters, lr=0.1, momentum=0.9),
        lambda parameters: AdamW(parameters, lr=0.1, weight_decay=0.0),
    ],
    ids=["SGD", "AdamW"],
)
def test_momentum_on_a_zero_gradient_is_named(make_optimizer: Callable[..., Optimizer]) -> None:
    model = Tiny()
    model.trunk.requires_grad_(True)
    optimizer = make_optimizer(model.parameters())
    train_once_then_freeze_carelessly(model, optimizer, set_to_none=False)
    report = collect(model, optimizer)
    assert found(report) == [
        ("grad_present", "trunk.weight", "frozen", 0),
        ("in_optimizer", "trunk.weight", "frozen", 0),
        ("param_changed", "trunk.weight", "frozen", 1),
    ]
    assert report.violations[2].cause.startswith("momentum moves a parameter whose gradient is zero")


def stale_gradient(make_optimizer: Callable[..., Optimizer]) -> Report:
    model = Tiny()
    model.trunk.requires_grad_(True)
    optimizer = make_optimizer(model.parameters())
    (model(X) - 1).square().mean().backward()
    model.trunk.requires_grad_(False)
    return collect(model, optimizer)


def test_a_stale_gradient_is_named_before_and_after_it_does_harm() -> None:
    report = stale_gradient(lambda parameters: SGD(parameters, lr=0.1))
    assert found(report) == [
        ("grad_present", "trunk.weight", "frozen", 0),
        ("in_optimizer", "trunk.weight", "frozen", 0),
        ("param_changed", "trunk.weight", "frozen", 1),
    ]
    assert report.violations[0].cause.startswith("a gradient left from before the freeze; set grad = None")
    assert report.violations[1].cause.startswith("the optimizer was built before the freeze")


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda parameters: SGD(parameters, lr=0.1, momentum=0.9),
        lambda parameters: AdamW(parameters, lr=0.1, weight_decay=0.1),
    ],
    ids=["SGD", "AdamW"],
)
def test_a_stale_gradient_that_is_not_zero_is_not_called_zero(make_optimizer: Callable[..., Optimizer]) -> None:
    report = stale_gradient(make_optimizer)
    assert found(report)[-1] == ("param_changed", "trunk.weight", "frozen", 1)
    assert "gradient is zero" not in report.violations[-1].cause


def train_once_then_freeze_carelessly(model: Tiny, optimizer: Optimizer, set_to_none: bool) -> None:
    """Freezes by flag only, after the optimizer was built and has stepped."""
    (model(X) - 1).square().mean().backward()
    optimizer.step()
    model.trunk.requires_grad_(False)
    optimizer.zero_grad(set_to_none=set_to_none)


def collect(model: nn.Module, optimizer: Optimizer) -> Report:
    audit = GradientAudit(model, ["trunk"], [optimizer], policy="collect")
    with audit.phase("frozen"):
        for _ in range(3):
            (model(X) - 1).square().mean().backward()
            audit.after_backward()
            optimizer.step()
            audit.after_step()
            for parameter in trainable(model):
                parameter.grad = None
    return audit.report


def test_a_frozen_tensor_in_an_optimizer_is_named_even_if_nothing_moves_it() -> None:
    model = Tiny()
    optimizer = SGD(model.parameters(), lr=0.1)
    report = collect(model, optimizer)
    assert report.ok
    assert hazards(report) == [("in_optimizer", "trunk.weight", "frozen", 0)]
    assert "built before the freeze" in report.hazards[0].cause
    assert report.hazards[0].detail.startswith("is held by an optimizer")


def test_a_frozen_tensor_that_enters_an_optimizer_later_is_named_with_its_step() -> None:
    model = Tiny()
    optimizer = SGD(model.head.parameters(), lr=0.1)
    audit = GradientAudit(model, ["trunk"], [optimizer], policy="collect")
    with audit.phase("frozen"):
        enter = {2: lambda: optimizer.add_param_group({"params": [model.trunk.weight]})}
        train(audit, model, [optimizer], after_step=enter)
    assert audit.report.ok
    assert hazards(audit.report) == [("in_optimizer", "trunk.weight", "frozen", 2)]


def test_a_trainable_tensor_in_no_optimizer_is_named() -> None:
    model = Tiny()
    report = collect(model, SGD([model.head.weight], lr=0.1))
    assert found(report) == [("not_in_optimizer", "head.bias", "frozen", 0)]
    assert "the optimizer was built without it" in only(report).cause


def test_a_tensor_thawed_after_the_optimizer_was_built_is_named_with_its_step() -> None:
    model = Tiny()
    model.head.bias.requires_grad_(False)
    report = run(model, after_step={2: lambda: model.head.bias.requires_grad_(True)})
    assert found(report) == [("not_in_optimizer", "head.bias", "frozen", 2)]
    assert "thawed after the optimizer was built" in only(report).cause


def test_a_tensor_is_in_an_optimizer_if_any_watched_one_holds_it() -> None:
    model = Tiny()
    optimizers = [SGD([model.head.weight], lr=0.1), SGD([model.head.bias], lr=0.1)]
    audit = GradientAudit(model, ["trunk"], optimizers)
    with audit.phase("frozen"):
        train(audit, model, optimizers)
    assert audit.report.ok


# --- planted: flags and modes


def test_requires_grad_left_on_is_named_before_the_first_step() -> None:
    model = Tiny()
    optimizer = SGD(trainable(model), lr=0.1)
    model.trunk.requires_grad_(True)
    audit = GradientAudit(model, ["trunk"], [optimizer], policy="collect")
    with audit.phase("frozen"):
        pass
    assert hazards(audit.report) == [("requires_grad", "trunk.weight", "frozen", 0)]
    assert "was not switched off" in audit.report.hazards[0].cause


def test_requires_grad_switched_on_again_is_named_with_its_step() -> None:
    model = Tiny()
    report = run(model, after_step={3: lambda: model.trunk.requires_grad_(True)})
    assert hazards(report) == [("requires_grad", "trunk.weight", "frozen", 3)]
    assert "switched on again after the freeze" in report.hazards[0].cause


def test_a_gradient_that_was_computed_is_blamed_on_the_flag() -> None:
    model = Tiny()
    report = run(model, num_steps=1, before_forward={1: lambda: model.trunk.requires_grad_(True)})
    assert found(report) == [
        ("grad_present", "trunk.weight", "frozen", 0),
        ("requires_grad", "trunk.weight", "frozen", 0),
    ]
    assert report.violations[0].cause.startswith("it required a gradient when the loss was computed")


def test_a_gradient_that_was_set_by_hand_is_named() -> None:
    model = Tiny()

    def plant() -> None:
        model.trunk.weight.grad = torch.zeros(2, 2)

    report = run(model, before_forward={3: plant})
    assert found(report) == [("grad_present", "trunk.weight", "frozen", 2)]
    assert "code gave it one" in only(report).cause
    assert only(report).detail == "has a gradient"


def test_batch_norm_in_train_mode_under_frozen_parameters_is_named() -> None:
    model = Normed()
    freeze_by_hand(model.trunk)
    model.train()
    report = run(model, num_steps=1)
    assert sorted(found(report)) == [
        ("buffer_changed", "trunk.1.num_batches_tracked", "frozen", 0),
        ("buffer_changed", "trunk.1.running_mean", "frozen", 0),
        ("buffer_changed", "trunk.1.running_var", "frozen", 0),
    ]
    assert hazards(report) == [
        ("train_mode", "trunk.1", "frozen", 0),
        ("active_dropout", "trunk.2", "frozen", 0),
    ]
    assert report.hazards[0].cause == "a .train() after the freeze; keep the frozen module in eval mode"
    assert report.hazards[0].detail == "BatchNorm1d is in train mode"
    assert all(each.cause.startswith("BatchNorm1d was run in train mode") for each in report.violations)


def test_a_train_call_in_mid_phase_is_named_at_the_next_backward() -> None:
    model = Normed()
    freeze_by_hand(model.trunk)
    audit = GradientAudit(model, ["trunk"], strict=True)
    with (
        pytest.raises(AuditError, match=r"phase 'frozen', step 1, trunk\.1: train_mode: BatchNorm1d is in train mode"),
        audit.phase("frozen"),
    ):
        train(audit, model, [], before_forward={2: model.train})


def test_a_buffer_that_is_not_in_the_state_dict_is_watched() -> None:
    model = Tiny()
    model.trunk.register_buffer("mask", torch.zeros(2), persistent=False)
    report = run(model, after_step={2: lambda: model.trunk.mask.add_(1)})
    assert found(report) == [("buffer_changed", "trunk.mask", "frozen", 2)]
    assert only(report).cause.startswith("code writes to this buffer though Linear is in eval mode")


def test_a_plain_tensor_attribute_is_watched() -> None:
    model = Tiny()
    model.trunk.scale = torch.ones(2)
    report = run(model, after_step={2: lambda: model.trunk.scale.mul_(3)})
    assert found(report) == [("attr_changed", "trunk.scale", "frozen", 2)]


def test_a_plain_tensor_attribute_is_not_blamed_on_a_buffer_update_that_linear_does_not_have() -> None:
    model = Tiny()
    model.trunk.train()
    model.trunk.scale = torch.ones(2)
    report = run(model, after_step={2: lambda: model.trunk.scale.mul_(3)})
    assert found(report) == [("attr_changed", "trunk.scale", "frozen", 2)]
    assert "updates its buffers on every forward" not in only(report).cause


# --- planted: identity and memory


def delete_weight(model: Tiny) -> None:
    del model.trunk.weight
    model.trunk.weight = torch.eye(2)


def swap_module(model: Tiny) -> None:
    model.trunk = nn.Linear(2, 2, bias=False).requires_grad_(False)


def test_a_parameter_registered_again_is_named() -> None:
    model = Tiny()

    def register() -> None:
        model.trunk.weight = nn.Parameter(model.trunk.weight.detach().clone(), requires_grad=False)

    report = run(model, after_step={2: register})
    assert found(report) == [("identity_changed", "trunk.weight", "frozen", 2)]
    assert only(report).detail == "is another tensor than when the phase began"
    assert "registered again after the freeze" in only(report).cause


def test_a_parameter_turned_into_a_plain_tensor_is_named_as_gone() -> None:
    model = Tiny()
    report = run(model, after_step={2: lambda: delete_weight(model)})
    assert found(report) == [("identity_changed", "trunk.weight", "frozen", 2)]
    assert only(report).detail == "is gone"


def test_a_buffer_registered_again_is_named() -> None:
    model = Tiny()
    model.trunk.register_buffer("scale", torch.ones(2))

    def register() -> None:
        model.trunk.scale = torch.ones(2)

    assert found(run(model, after_step={2: register})) == [("identity_changed", "trunk.scale", "frozen", 2)]


def test_a_swapped_module_is_named() -> None:
    model = Tiny()
    report = run(model, after_step={2: lambda: swap_module(model)})
    assert found(report) == [("identity_changed", "trunk.weight", "frozen", 2)]
    assert "replaced after the freeze" in only(report).cause


def test_a_swapped_child_of_a_frozen_module_is_named() -> None:
    model = Normed()
    freeze_by_hand(model.trunk)

    def swap() -> None:
        model.trunk[0] = nn.Linear(2, 4, bias=False).requires_grad_(False)

    assert found(run(model, after_step={2: swap})) == [("identity_changed", "trunk.0.weight", "frozen", 2)]


def test_a_view_of_a_flat_tensor_across_the_line_is_named() -> None:
    model = Tiny()
    flat = torch.arange(6.0)
    model.trunk.weight = nn.Parameter(flat[:4].view(2, 2), requires_grad=False)
    model.head.weight = nn.Parameter(flat[3:5].view(1, 2))
    report = run(model, num_steps=0)
    assert found(report) == [("shared_storage", "trunk.weight", "frozen", 0)]
    assert "tied or viewed" in only(report).cause
    assert only(report).detail == "lies in the same memory as head.weight, which is not frozen"


def test_a_tied_weight_with_only_one_name_frozen_is_named() -> None:
    model = Tiny()
    model.other = nn.Linear(2, 2, bias=False)
    model.other.weight = model.trunk.weight
    report = run(model, num_steps=0)
    assert found(report) == [("shared_storage", "trunk.weight", "frozen", 0)]
    assert only(report).detail == "lies in the same memory as other.weight, which is not frozen"


def test_a_module_reached_by_two_paths_with_only_one_frozen_is_named() -> None:
    model = Tiny()
    model.other = model.trunk
    report = run(model, num_steps=0)
    assert found(report) == [("shared_storage", "trunk.weight", "frozen", 0)]
    silent(run(model, freeze=["trunk", "other"]), 3)


def test_a_buffer_that_views_a_training_parameter_is_named() -> None:
    model = Tiny()
    model.trunk.register_buffer("view", model.head.weight.detach()[0])
    report = run(model, num_steps=0)
    assert found(report) == [("shared_storage", "trunk.view", "frozen", 0)]


def test_neighbours_in_one_flat_tensor_share_no_byte_and_are_silent() -> None:
    model = Tiny()
    flat = torch.arange(6.0)
    model.trunk.weight = nn.Parameter(flat[:4].view(2, 2), requires_grad=False)
    model.head.weight = nn.Parameter(flat[4:].view(1, 2))
    assert run(model).ok
    assert flat[:4].tolist() == [0.0, 1.0, 2.0, 3.0]


# --- tensors that come and go


class Remembering(nn.Module):
    """Keeps its last output, without a graph, as a frozen trunk under no_grad does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.last = torch.zeros(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.linear(x).detach()
        return self.last


def test_what_a_frozen_module_remembers_of_its_forward_is_no_violation() -> None:
    model = nn.ModuleDict({"trunk": Remembering(), "head": nn.Linear(2, 1)})
    freeze_by_hand(model["trunk"])
    optimizer = SGD(model["head"].parameters(), lr=0.1)
    audit = GradientAudit(model, ["trunk"], [optimizer])
    for phase in ("a", "b"):
        with audit.phase(phase):
            for _ in range(3):
                model["head"](model["trunk"](torch.randn(4, 2))).sum().backward()
                audit.after_backward()
                optimizer.step()
                audit.after_step()
                optimizer.zero_grad()
    assert audit.report.ok and [phase.num_steps for phase in audit.report.phases] == [3, 3]


def test_a_layer_hung_into_a_frozen_part_after_the_freeze_is_named() -> None:
    model = Tiny()

    def add_adapter() -> None:
        model.trunk.adapter = nn.Linear(2, 2, bias=False)

    report = run(model, after_step={2: add_adapter})
    assert [(v.kind, v.name) for v in report.violations] == [("identity_changed", "trunk.adapter.weight")]
    assert "was not there when the phase began" in report.violations[0].detail


class Hiding(nn.Module):
    """A trunk that keeps experts where torch does not see them, under a head."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(2, 2)
        self.trunk.experts = [nn.Linear(2, 2), {"norm": nn.BatchNorm1d(2)}]  # type: ignore[assignment]
        self.head = nn.Linear(2, 1)
        self.teacher = [nn.Linear(2, 1)]
        freeze_by_hand(self.trunk)

    def forward(self, x: Tensor) -> Tensor:
        experts: Any = self.trunk.experts
        return self.head(experts[1]["norm"](experts[0](self.trunk(x))))


def test_modules_in_lists_and_dictionaries_are_held_to_the_contract_by_name() -> None:
    model = Hiding()
    report = run(model, num_steps=1)
    kinds = {(violation.kind, violation.name) for violation in report.violations}
    assert {
        ("requires_grad", "trunk.experts.0.weight"),
        ("grad_present", "trunk.experts.0.bias"),
        ("buffer_changed", "trunk.experts.1.norm.running_mean"),
    } <= kinds
    assert not any("teacher" in name for _, name in kinds), "a teacher may be hidden on purpose"


def test_hidden_modules_that_are_really_frozen_are_silent_and_a_written_bit_is_found() -> None:
    model = Hiding()
    experts: Any = model.trunk.experts
    for expert in (experts[0], experts[1]["norm"]):
        freeze_by_hand(expert)
    clean = run(model)
    silent(clean, 3)
    assert len(clean.phases[0].fingerprints) == 2 + 2 + 5
    report = run(model, after_step={2: lambda: write_numpy_alias(experts[0].weight)})
    assert [(v.kind, v.name) for v in report.violations] == [("param_changed", "trunk.experts.0.weight")]


def test_a_registered_module_that_is_listed_as_well_is_not_named_twice() -> None:
    model = Tiny()
    model.layers = [model.trunk, model.head]  # type: ignore[assignment]
    clean = run(model)
    silent(clean, 3)
    assert {*clean.phases[0].fingerprints} == {"trunk.weight"}
