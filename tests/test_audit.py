"""The audit: planted faults, each of which is named exactly, and correct loops in which it stays silent.

Freezing is done by hand here, as in a stranger's loop: the audit must not need the code that freezes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from mtl.audit import AuditError, GradientAudit, PhaseRecord, Report, Violation, fingerprint
from mtl.patterns import PatternError


class Tiny(nn.Module):
    """Three parameters, trunk.weight, head.weight and head.bias; the trunk is frozen by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(2, 2, bias=False)
        self.head = nn.Linear(2, 1)
        with torch.no_grad():
            self.trunk.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
            self.head.weight.copy_(torch.tensor([[0.5, -0.5]]))
            self.head.bias.fill_(0.25)
        freeze_by_hand(self.trunk)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))


def freeze_by_hand(module: nn.Module) -> None:
    module.requires_grad_(False)
    module.eval()
    for parameter in module.parameters():
        parameter.grad = None


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


Fault = Callable[[], object]
X = torch.tensor([[1.0, 2.0], [-1.0, 0.5], [0.5, 3.0]])


def train(
    audit: GradientAudit,
    model: nn.Module,
    optimizers: Iterable[Optimizer],
    num_steps: int = 3,
    before_forward: dict[int, Fault] | None = None,
    after_step: dict[int, Fault] | None = None,
) -> None:
    """The loop of the documentation, with faults planted at given steps, counted from 1."""
    for step in range(1, num_steps + 1):
        (before_forward or {}).get(step, bool)()
        loss = (model(X) - 1).square().mean()
        if loss.requires_grad:
            loss.backward()
        audit.after_backward()
        for optimizer in optimizers:
            optimizer.step()
        (after_step or {}).get(step, bool)()
        audit.after_step()
        for optimizer in optimizers:
            optimizer.zero_grad()


def run(model: nn.Module, freeze: Sequence[str] = ("trunk",), num_steps: int = 3, **faults: dict[int, Fault]) -> Report:
    """One phase under the policy `collect`, with an optimizer of exactly what trains."""
    optimizer = SGD(trainable(model), lr=0.1)
    audit = GradientAudit(model, freeze, [optimizer], policy="collect")
    with audit.phase("frozen"):
        train(audit, model, [optimizer], num_steps, **faults)
    return audit.report


def found(report: Report) -> list[tuple[str, str, str, int]]:
    return [(v.kind, v.name, v.phase, v.step) for v in report.violations]


def only(report: Report) -> Violation:
    assert len(report.violations) == 1, report.violations
    assert not report.ok
    return report.violations[0]


# --- planted: written elsewhere


def write_data(weight: nn.Parameter) -> None:
    weight.data.add_(1)


def assign_data(weight: nn.Parameter) -> None:
    weight.data = weight.data + 1


def write_in_place(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.mul_(2)


def write_numpy_alias(weight: nn.Parameter) -> None:
    weight.detach().numpy()[...] += 1


def write_smallest_bit(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.view(torch.int32)[0, 0] ^= 1


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
    "write",
    [
        write_data,
        assign_data,
        write_in_place,
        write_numpy_alias,
        write_smallest_bit,
        flip_sign_of_zero,
        permute_elements,
        write_nan,
    ],
)
def test_a_write_to_a_frozen_parameter_is_named(write: Callable[[nn.Parameter], None]) -> None:
    model = Tiny()
    report = run(model, after_step={3: lambda: write(model.trunk.weight)})
    violation = only(report)
    assert found(report) == [("param_changed", "trunk.weight", "frozen", 3)]
    assert violation.cause.startswith("written outside the optimizers (load_state_dict, re-initialisation, .data")
    assert violation.detail == "its bytes differ from the first ones"


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
        assert audit.report.ok
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
@settings(deadline=None, derandomize=True, database=None, max_examples=50)
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
        assert audit.report.ok
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
    assert found(report) == [("in_optimizer", "trunk.weight", "frozen", 0)]
    assert "built before the freeze" in only(report).cause
    assert only(report).detail.startswith("is held by an optimizer")


def test_a_frozen_tensor_that_enters_an_optimizer_later_is_named_with_its_step() -> None:
    model = Tiny()
    optimizer = SGD(model.head.parameters(), lr=0.1)
    audit = GradientAudit(model, ["trunk"], [optimizer], policy="collect")
    with audit.phase("frozen"):
        enter = {2: lambda: optimizer.add_param_group({"params": [model.trunk.weight]})}
        train(audit, model, [optimizer], after_step=enter)
    assert found(audit.report) == [("in_optimizer", "trunk.weight", "frozen", 2)]


def test_a_trainable_tensor_in_no_optimizer_is_named() -> None:
    model = Tiny()
    report = collect(model, SGD([model.head.weight], lr=0.1))
    assert found(report) == [("not_in_optimizer", "head.bias", "frozen", 0)]
    assert "rebuild the optimizer" in only(report).cause


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
    assert found(audit.report) == [("requires_grad", "trunk.weight", "frozen", 0)]
    assert "was not switched off" in only(audit.report).cause


def test_requires_grad_switched_on_again_is_named_with_its_step() -> None:
    model = Tiny()
    report = run(model, after_step={3: lambda: model.trunk.requires_grad_(True)})
    assert found(report) == [("requires_grad", "trunk.weight", "frozen", 3)]
    assert "switched on again after the freeze" in only(report).cause


def test_a_gradient_that_was_computed_is_blamed_on_the_flag() -> None:
    model = Tiny()
    report = run(model, num_steps=1, before_forward={1: lambda: model.trunk.requires_grad_(True)})
    assert found(report) == [
        ("grad_present", "trunk.weight", "frozen", 0),
        ("requires_grad", "trunk.weight", "frozen", 1),
    ]
    assert report.violations[0].cause.startswith("it required a gradient when the loss was computed")


def test_a_gradient_that_was_set_by_hand_is_named() -> None:
    model = Tiny()

    def plant() -> None:
        model.trunk.weight.grad = torch.zeros(2, 2)

    report = run(model, before_forward={3: plant})
    assert found(report) == [("grad_present", "trunk.weight", "frozen", 2)]
    assert "a gradient left from before the freeze" in only(report).cause
    assert only(report).detail == "has a gradient"


class Normed(nn.Module):
    """trunk = Linear, BatchNorm, Dropout; head = Dropout, Linear, BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(2, 4, bias=False), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(4, 2, bias=False), nn.BatchNorm1d(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))


def test_batch_norm_in_train_mode_under_frozen_parameters_is_named() -> None:
    model = Normed()
    freeze_by_hand(model.trunk)
    model.train()
    report = run(model, num_steps=1)
    assert sorted(found(report)) == [
        ("buffer_changed", "trunk.1.num_batches_tracked", "frozen", 1),
        ("buffer_changed", "trunk.1.running_mean", "frozen", 1),
        ("buffer_changed", "trunk.1.running_var", "frozen", 1),
        ("train_mode", "trunk.1", "frozen", 0),
    ]
    causes = {violation.kind: violation.cause for violation in report.violations}
    assert causes["train_mode"] == "a .train() after the freeze; keep the frozen module in eval mode"
    assert causes["buffer_changed"].startswith("BatchNorm1d was run in train mode")
    assert report.violations[0].detail == "BatchNorm1d is in train mode"


def test_a_train_call_in_mid_phase_is_named_at_the_next_backward() -> None:
    model = Normed()
    freeze_by_hand(model.trunk)
    audit = GradientAudit(model, ["trunk"])
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
    assert only(report).cause.startswith("the forward of Linear or other code writes to this buffer")


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


def test_a_parameter_registered_anew_is_named() -> None:
    model = Tiny()

    def register() -> None:
        model.trunk.weight = nn.Parameter(model.trunk.weight.detach().clone(), requires_grad=False)

    report = run(model, after_step={2: register})
    assert found(report) == [("identity_changed", "trunk.weight", "frozen", 2)]
    assert only(report).detail == "is another tensor than when the phase began"
    assert "replaced after the freeze" in only(report).cause


def test_a_parameter_turned_into_a_plain_tensor_is_named_as_gone() -> None:
    model = Tiny()
    report = run(model, after_step={2: lambda: delete_weight(model)})
    assert found(report) == [("identity_changed", "trunk.weight", "frozen", 2)]
    assert only(report).detail == "is gone"


def test_a_buffer_registered_anew_is_named() -> None:
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


# --- policies


def test_the_policy_raise_stops_at_the_step_of_the_fault_and_carries_the_violation() -> None:
    model = Tiny()
    optimizer = SGD(trainable(model), lr=0.1)
    audit = GradientAudit(model, ["trunk"], [optimizer])
    message = (
        r"^the freeze was broken:\n  phase 'frozen', step 2, trunk\.weight: param_changed: its bytes differ from the"
        r" first ones; likely cause: written outside the optimizers"
    )
    with pytest.raises(AuditError, match=message) as caught, audit.phase("frozen"):
        train(audit, model, [optimizer], after_step={2: lambda: write_in_place(model.trunk.weight)})
    assert caught.value.violations == audit.report.violations == audit.report.phases[0].violations
    assert audit.report.phases[0].num_steps == 2
    assert not audit.report.phases[0].completed


def test_the_policy_raise_does_not_let_a_broken_phase_begin() -> None:
    model = Tiny()
    audit = GradientAudit(model, ["trunk"], [SGD(model.parameters(), lr=0.1)])
    entered = []
    with pytest.raises(AuditError, match=r"step 0, trunk\.weight: in_optimizer"), audit.phase("frozen"):
        entered.append(True)
    assert entered == []
    assert not audit.report.ok


def test_the_policy_warn_warns_once_and_goes_on() -> None:
    model = Tiny()
    optimizer = SGD(trainable(model), lr=0.1)
    audit = GradientAudit(model, ["trunk"], [optimizer], policy="warn")
    with pytest.warns(UserWarning) as caught, audit.phase("frozen"):
        train(audit, model, [optimizer], num_steps=4, after_step={2: lambda: write_in_place(model.trunk.weight)})
    assert [str(warning.message) for warning in caught] == [str(audit.report.violations[0])]
    assert str(caught[0].message).startswith("phase 'frozen', step 2, trunk.weight: param_changed")
    assert audit.report.phases[0].num_steps == 4
    assert audit.report.phases[0].completed


def test_the_policy_collect_says_nothing_and_goes_on() -> None:
    model = Tiny()
    report = run(model, num_steps=4, after_step={2: lambda: write_in_place(model.trunk.weight)})
    assert not report.ok
    assert report.phases[0].num_steps == 4
    assert report.phases[0].completed


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="expected the policy raise, warn or collect, got 'ignore'"):
        GradientAudit(Tiny(), policy="ignore")  # type: ignore[arg-type]


def test_a_pattern_that_selects_nothing_is_refused_and_opens_no_phase() -> None:
    audit = GradientAudit(Tiny(), ["trnk"])
    with pytest.raises(PatternError, match="pattern 'trnk' matches nothing"), audit.phase("frozen"):
        pass
    assert audit.report.phases == []
    with audit.phase("next", freeze=["trunk"]):
        pass
    assert audit.report.phases[0].completed


def test_many_violations_of_one_moment_are_counted_in_the_message_and_all_carried() -> None:
    model = nn.ModuleDict({"trunk": nn.Sequential(*[nn.Linear(1, 1) for _ in range(4)])})
    audit = GradientAudit(model, ["trunk"])
    with pytest.raises(AuditError, match="and 3 more of the same moment") as caught, audit.phase("frozen"):
        pass
    assert len(caught.value.violations) == 8


def test_the_same_violation_is_recorded_once_per_phase() -> None:
    model = Tiny()
    audit = GradientAudit(model, ["trunk"], policy="collect")

    def write() -> None:
        write_in_place(model.trunk.weight)

    for name in ("first", "second"):
        with audit.phase(name):
            train(audit, model, [], after_step=dict.fromkeys([1, 2, 3], write))
            audit.verify()
    assert found(audit.report) == [
        ("param_changed", "trunk.weight", "first", 1),
        ("param_changed", "trunk.weight", "second", 1),
    ]


# --- correct loops: silence


def silent(report: Report, num_steps: int) -> None:
    """Nothing was found, and not because nothing was done: every trainable parameter moved."""
    assert report.ok
    assert report.violations == []
    for phase in report.phases:
        assert phase.completed
        assert phase.num_steps == num_steps > 0
        assert phase.num_trained == phase.num_trainable > 0
        assert len(phase.fingerprints) > 0
        assert phase.num_fingerprint_checks >= len(phase.fingerprints)
        assert phase.num_tripwire_checks >= 2 * num_steps * len(phase.fingerprints)


@pytest.mark.parametrize("make_model", [Tiny, Normed])
@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda parameters: SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01),
        lambda parameters: AdamW(parameters, lr=0.01, foreach=True),
        lambda parameters: AdamW(parameters, lr=0.01, fused=True),
    ],
    ids=["SGD with momentum", "AdamW foreach", "AdamW fused"],
)
def test_training_beside_a_frozen_trunk_is_silent(
    make_model: Callable[[], Any], make_optimizer: Callable[..., Optimizer]
) -> None:
    # Normed: BatchNorm and Dropout, held in eval in the trunk and active in the head.
    model = make_model()
    freeze_by_hand(model.trunk)
    optimizer = make_optimizer(trainable(model))
    audit = GradientAudit(model, ["trunk"], [optimizer])
    with audit.phase("frozen"):
        train(audit, model, [optimizer], 5)
    silent(audit.report, 5)


def test_training_through_a_frozen_head_is_silent() -> None:
    model = Normed()
    freeze_by_hand(model.head)
    optimizer = AdamW(trainable(model), lr=0.01)
    audit = GradientAudit(model, ["head"], [optimizer])
    with audit.phase("frozen"):
        train(audit, model, [optimizer], 5)
    silent(audit.report, 5)


def test_gradient_accumulation_is_silent() -> None:
    model = Normed()
    freeze_by_hand(model.trunk)
    optimizer = AdamW(trainable(model), lr=0.01)
    audit = GradientAudit(model, ["trunk"], [optimizer])
    with audit.phase("frozen"):
        for _ in range(3):
            for _ in range(4):
                (model(X).square().mean() / 4).backward()
                audit.after_backward()
            optimizer.step()
            audit.after_step()
            optimizer.zero_grad()
    silent(audit.report, 3)


def test_tied_weights_frozen_by_both_names_are_silent() -> None:
    model = Tiny()
    model.other = nn.Linear(2, 2, bias=False)
    model.other.weight = model.trunk.weight
    report = run(model, freeze=["trunk", "other"])
    silent(report, 3)
    assert [*report.phases[0].fingerprints] == ["trunk.weight", "other.weight"]


def test_tied_weights_that_train_are_silent() -> None:
    model = Tiny()
    model.other = nn.Linear(2, 1)
    model.other.weight = model.head.weight
    model.other.bias = model.head.bias
    silent(run(model), 3)


def test_nan_in_a_frozen_tensor_is_silent() -> None:
    model = Tiny()
    # As in a padding row that is never looked up.
    model.trunk.table = nn.Parameter(torch.tensor([[1.0, 2.0], [torch.nan, -torch.nan]]), requires_grad=False)
    model.trunk.register_buffer("limit", torch.tensor(torch.nan))
    silent(run(model), 3)


def test_a_warm_up_from_a_rate_of_zero_is_silent() -> None:
    model = Tiny()
    optimizer = AdamW(trainable(model), lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 4)
    assert optimizer.param_groups[0]["lr"] == 0.0
    audit = GradientAudit(model, ["trunk"], [optimizer])
    with audit.phase("frozen"):
        train(audit, model, [optimizer], 4, after_step=dict.fromkeys(range(1, 5), schedule.step))
    silent(audit.report, 4)


def test_a_frozen_tensor_written_with_its_own_bytes_is_silent() -> None:
    model = Tiny()
    weight = model.trunk.weight

    def rewrite() -> None:
        version = weight._version
        model.load_state_dict({**model.state_dict(), "trunk.weight": weight.detach().clone()})
        assert weight._version > version

    silent(run(model, after_step={1: rewrite, 2: rewrite}), 3)


def test_a_frozen_tensor_moved_to_another_place_in_memory_is_silent() -> None:
    model = Tiny()
    weight = model.trunk.weight

    def move() -> None:
        address = weight.data_ptr()
        weight.data = weight.data.clone()
        assert weight.data_ptr() != address

    silent(run(model, after_step={2: move}), 3)


def test_a_tensor_that_was_made_in_inference_mode_is_silent_too() -> None:
    model = Tiny()
    with torch.inference_mode():
        # As a frozen module's own cache of positions or masks, filled while validating.
        model.trunk.register_buffer("positions", torch.arange(3.0), persistent=False)
    silent(run(model), 3)


def test_validation_in_the_middle_is_silent() -> None:
    model = Normed()
    freeze_by_hand(model.trunk)

    def validate() -> None:
        model.eval()
        with torch.no_grad():
            model(X)
        model.head.train()

    silent(run(model, after_step={1: validate, 2: validate}), 3)


def test_two_phases_with_different_freezes_are_silent() -> None:
    model = Normed()
    audit = GradientAudit(model)
    for name in ("trunk", "head"):
        model.requires_grad_(True).train()
        freeze_by_hand(getattr(model, name))
        optimizer = SGD(trainable(model), lr=0.1, momentum=0.9)
        with audit.phase(f"frozen {name}", freeze=[name], optimizers=[optimizer]):
            train(audit, model, [optimizer], 4)
    silent(audit.report, 4)
    first, second = audit.report.phases
    assert (first.freeze, second.freeze) == (["trunk"], ["head"])
    assert next(iter(first.fingerprints)) == "trunk.0.weight"
    assert next(iter(second.fingerprints)) == "head.1.weight"


def test_a_phase_that_freezes_nothing_watches_nothing_and_is_silent() -> None:
    model = Normed()
    report = run(model, freeze=[])
    assert report.ok
    record = report.phases[0]
    assert (record.fingerprints, record.num_steps, record.num_trained) == ({}, 3, 6)


def test_a_phase_that_freezes_everything_is_silent() -> None:
    model = Normed()
    freeze_by_hand(model)
    audit = GradientAudit(model, ["**"])
    with audit.phase("frozen"):
        train(audit, model, [])
    assert audit.report.ok
    assert audit.report.phases[0].num_steps == 3
    assert audit.report.phases[0].num_trainable == 0
    assert len(audit.report.phases[0].fingerprints) == 12


def test_an_optimizer_added_by_watch_is_silent_if_right_and_named_if_wrong() -> None:
    model = Tiny()
    audit = GradientAudit(model, ["trunk"], policy="collect")
    with audit.phase("right"):
        optimizer = SGD(trainable(model), lr=0.1)
        audit.watch(optimizer)
        train(audit, model, [optimizer])
    silent(audit.report, 3)
    with audit.phase("wrong"):
        audit.watch(SGD([model.trunk.weight], lr=0.1))
        train(audit, model, [optimizer])
    assert found(audit.report) == [("in_optimizer", "trunk.weight", "wrong", 1)]


def test_optimizers_given_to_a_phase_stay_for_the_next() -> None:
    model = Tiny()
    audit = GradientAudit(model, ["trunk"], policy="collect")
    with audit.phase("first", optimizers=[SGD(model.parameters(), lr=0.1)]):
        pass
    with audit.phase("second"):
        pass
    assert found(audit.report) == [
        ("in_optimizer", "trunk.weight", "first", 0),
        ("in_optimizer", "trunk.weight", "second", 0),
    ]


# --- phases, report


@pytest.mark.parametrize("method", ["after_backward", "after_step", "verify"])
@pytest.mark.parametrize("used_before", [False, True], ids=["before any phase", "after a phase"])
def test_the_audit_outside_a_phase_is_refused(method: str, used_before: bool) -> None:
    audit = GradientAudit(Tiny(), ["trunk"])
    if used_before:
        with audit.phase("over"):
            pass
    with pytest.raises(RuntimeError, match=r"^no phase is open: the audit works inside `with audit\.phase\(name\):`"):
        getattr(audit, method)()


def test_a_phase_inside_a_phase_is_refused() -> None:
    audit = GradientAudit(Tiny(), ["trunk"])
    with audit.phase("outer") as outer:
        with pytest.raises(RuntimeError, match=r"^phase 'outer' is still open$"), audit.phase("inner"):
            pass
        audit.verify()
    assert outer.completed
    assert [phase.name for phase in audit.report.phases] == ["outer"]


def test_an_exception_in_a_phase_is_not_masked_and_the_phase_not_completed() -> None:
    model = Tiny()
    audit = GradientAudit(model, ["trunk"])
    error = KeyError("the loader's own")
    with pytest.raises(KeyError) as caught, audit.phase("broken off"):
        train(audit, model, [], 2)
        # Also not masked by what the audit would have found.
        write_numpy_alias(model.trunk.weight)
        raise error
    assert caught.value is error
    record = audit.report.phases[0]
    assert not record.completed
    assert record.num_steps == 2
    with audit.phase("next"):
        pass
    assert audit.report.phases[1].completed


def test_the_report_has_this_shape() -> None:
    model = Tiny()
    optimizer = SGD(trainable(model), lr=0.1)
    digest = fingerprint(model.trunk.weight)
    audit = GradientAudit(model, ["trunk"], [optimizer], policy="collect")
    with audit.phase("clean") as record:
        root = record.root
        train(audit, model, [optimizer], 2)
    with audit.phase("broken"):
        train(audit, model, [optimizer], 2, after_step={1: lambda: write_in_place(model.trunk.weight)})
    report = json.loads(json.dumps(audit.report.to_json()))
    clean, broken = report["phases"]
    assert report["ok"] is False
    assert clean == {
        "name": "clean",
        "ok": True,
        "completed": True,
        "freeze": ["trunk"],
        "frozen": {"count": 1, "root": root, "fingerprints": {"trunk.weight": digest}},
        "trainable": {"count": 2, "changed": 2},
        "checks": {"steps": 2, "tripwires": 4, "fingerprints": 1},
        "violations": [],
    }
    assert broken["ok"] is False
    assert broken["frozen"] == clean["frozen"]
    assert broken["violations"] == [
        {
            "kind": "param_changed",
            "name": "trunk.weight",
            "phase": "broken",
            "step": 1,
            "cause": audit.report.violations[0].cause,
            "detail": "its bytes differ from the first ones",
        }
    ]


def test_a_root_changes_with_the_bytes_behind_it() -> None:
    model = Tiny()
    audit = GradientAudit(model, ["trunk"])
    roots = []
    for name in ("a", "b", "c"):
        with audit.phase(name) as record:
            roots.append(record.root)
        if name == "b":
            write_smallest_bit(model.trunk.weight)
    assert roots[0] == roots[1] != roots[2]


def test_the_record_of_a_phase_is_the_one_in_the_report() -> None:
    audit = GradientAudit(Tiny(), ["trunk"])
    with audit.phase("frozen") as record:
        assert isinstance(record, PhaseRecord)
        assert audit.report.phases[-1] is record
        assert not record.completed
    assert record.completed


def test_num_trained_counts_what_really_moved() -> None:
    model = Tiny()
    optimizer = SGD([{"params": [model.head.weight], "lr": 0.1}, {"params": [model.head.bias], "lr": 0.0}])
    audit = GradientAudit(model, ["trunk"], [optimizer])
    with audit.phase("frozen") as record:
        train(audit, model, [optimizer])
    assert (record.num_trainable, record.num_trained) == (2, 1)


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
