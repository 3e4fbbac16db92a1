"""The optimizer of a phase: rates and groups as tables, what it holds and carries over, the rate at literal steps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from mtl.config import OptimConfig
from mtl.freeze import enforce, plan_freeze, trainable_parameters
from mtl.optim import LearningRateError, build_lr_schedule, build_optimizer, group_parameters, rates
from mtl.patterns import PatternError


class Tiny(nn.Module):
    """Parameters trunk.weight, trunk.bias, head.weight, head.bias."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(2, 2)
        self.head = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))


NAMES = ["trunk.weight", "trunk.bias", "head.weight", "head.bias"]


def optimizer_of(model: nn.Module, freeze: list[str], previous: Optimizer | None = None, lr: float = 0.1) -> Optimizer:
    """What a phase with this freeze trains with."""
    plan = plan_freeze(model, freeze)
    enforce(model, plan)
    parameters = trainable_parameters(model, plan)
    groups = group_parameters(OptimConfig(), parameters, dict.fromkeys(parameters, lr))
    return build_optimizer(groups, previous)


def step(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.tensor([[1.0, 2.0]])).square().sum().backward()
    optimizer.step()


def held(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Names of the parameters in an optimizer, one for each time that it holds them."""
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    return sorted(name_of[id(parameter)] for group in optimizer.param_groups for parameter in group["params"])


def with_state(model: nn.Module, optimizer: Optimizer) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter in optimizer.state}


# --- rates


@pytest.mark.parametrize(
    ("lr", "trainable", "expected"),
    [
        (0.1, NAMES, {"trunk.weight": 0.1, "trunk.bias": 0.1, "head.weight": 0.1, "head.bias": 0.1}),
        (0.1, ["head.bias"], {"head.bias": 0.1}),
        ({"**": 0.1, "head": 0.2}, NAMES[1:], {"trunk.bias": 0.1, "head.weight": 0.2, "head.bias": 0.2}),
        ({"head": 0.2, "**": 0.1}, NAMES[2:], {"head.weight": 0.1, "head.bias": 0.1}),
        ({"trunk": 0.1, "head": 0.2, "**.bias": 0.3}, NAMES, dict(zip(NAMES, [0.1, 0.3, 0.2, 0.3], strict=True))),
        ({"trunk": 0.1, "head": 0.2}, ["head.bias"], {"head.bias": 0.2}),
    ],
    ids=["one for all", "one for few", "last decides", "last decides over all", "three patterns", "one frozen"],
)
def test_the_rate_of_each_trainable_parameter_is_this_table(
    lr: float | dict[str, float], trainable: list[str], expected: dict[str, float]
) -> None:
    assert rates(lr, trainable, NAMES, balance_lr=9.0) == expected


def test_the_balancing_methods_own_parameters_have_their_rate_unless_a_table_names_them() -> None:
    names = ["head.weight", "balance.weights"]
    assert rates({"head": 0.1}, names, names, balance_lr=0.5) == {"head.weight": 0.1, "balance.weights": 0.5}
    assert rates({"**": 0.1}, names, names, balance_lr=0.5) == {"head.weight": 0.1, "balance.weights": 0.1}
    assert rates({"head": 0.1, "balance": 0.2}, names, names, balance_lr=0.5)["balance.weights"] == 0.2


def test_a_table_that_leaves_a_trainable_parameter_without_a_rate_is_refused() -> None:
    with pytest.raises(LearningRateError, match=r"no pattern covers 2 trainable parameters, such as trunk\.weight;"):
        rates({"head": 0.1}, NAMES, NAMES, balance_lr=0.5)


def test_a_rate_for_nothing_is_refused() -> None:
    with pytest.raises(PatternError, match=r"pattern 'heads' matches nothing \(nearest: head"):
        rates({"**": 0.1, "heads": 0.2}, NAMES, NAMES, balance_lr=0.5)


# --- groups


def test_vectors_and_scalars_are_not_decayed() -> None:
    parameters = {
        "conv.weight": nn.Parameter(torch.ones(2, 3, 1, 1)),
        "fc.weight": nn.Parameter(torch.ones(2, 3)),
        "norm.weight": nn.Parameter(torch.ones(2)),
        "fc.bias": nn.Parameter(torch.ones(1)),
        "log_variance": nn.Parameter(torch.ones(())),
    }
    groups = group_parameters(OptimConfig(weight_decay=0.3), parameters, dict.fromkeys(parameters, 0.1))
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    table = [([name_of[id(p)] for p in group["params"]], group["lr"], group["weight_decay"]) for group in groups]
    assert table == [
        (["conv.weight", "fc.weight"], 0.1, 0.3),
        (["norm.weight", "fc.bias", "log_variance"], 0.1, 0.0),
    ]


def test_parameters_of_one_rate_and_decay_share_a_group() -> None:
    model = Tiny()
    lr_of = {"trunk.weight": 0.1, "trunk.bias": 0.1, "head.weight": 0.2, "head.bias": 0.1}
    groups = group_parameters(OptimConfig(weight_decay=0.3), dict(model.named_parameters()), lr_of)
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    table = [([name_of[id(p)] for p in group["params"]], group["lr"], group["weight_decay"]) for group in groups]
    assert table == [
        (["trunk.weight"], 0.1, 0.3),
        (["trunk.bias", "head.bias"], 0.1, 0.0),
        (["head.weight"], 0.2, 0.3),
    ]


def test_decay_pulls_weights_towards_zero_and_leaves_biases() -> None:
    model = Tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    parameters = dict(model.named_parameters())
    groups = group_parameters(OptimConfig(weight_decay=0.5), parameters, dict.fromkeys(parameters, 0.1))
    optimizer = build_optimizer(groups)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    # AdamW: w <- w (1 - lr decay); a gradient of zero adds nothing.
    assert model.trunk.weight.detach().flatten().tolist() == pytest.approx([0.95] * 4)
    assert model.head.weight.detach().flatten().tolist() == pytest.approx([0.95] * 2)
    assert model.trunk.bias.tolist() == [1.0, 1.0]
    assert model.head.bias.tolist() == [1.0]


# --- what is held, carried


@pytest.mark.parametrize(
    ("freeze", "expected"),
    [
        ([], ["head.bias", "head.weight", "trunk.bias", "trunk.weight"]),
        (["trunk"], ["head.bias", "head.weight"]),
        (["**.bias"], ["head.weight", "trunk.weight"]),
        (["**", "!head.bias"], ["head.bias"]),
    ],
)
def test_the_optimizer_holds_exactly_what_trains_each_once(freeze: list[str], expected: list[str]) -> None:
    model = Tiny()
    assert held(model, optimizer_of(model, freeze)) == expected
    assert sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad) == expected


def test_a_tied_tensor_is_held_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    assert held(model, optimizer_of(model, [])) == ["a.bias", "a.weight", "b.bias"]


def test_without_an_optimizer_before_there_is_no_state() -> None:
    model = Tiny()
    assert with_state(model, optimizer_of(model, [])) == set()


def test_state_is_carried_for_what_goes_on_and_absent_for_what_is_frozen_or_thawed() -> None:
    model = Tiny()
    first = optimizer_of(model, ["trunk.weight"])
    for _ in range(3):
        step(model, first)
    assert with_state(model, first) == {"trunk.bias", "head.weight", "head.bias"}
    moments = {name: first.state[p]["exp_avg"].clone() for name, p in model.named_parameters() if p in first.state}

    second = optimizer_of(model, ["head.bias"], first)
    assert held(model, second) == ["head.weight", "trunk.bias", "trunk.weight"]
    assert with_state(model, second) == {"trunk.bias", "head.weight"}
    assert model.head.weight in first.state
    for name in ("trunk.bias", "head.weight"):
        state = second.state[model.get_parameter(name)]
        assert state["step"].item() == 3
        assert torch.equal(state["exp_avg"], moments[name])
        assert state["exp_avg"].any()

    step(model, second)
    assert with_state(model, second) == {"trunk.weight", "trunk.bias", "head.weight"}
    assert second.state[model.head.weight]["step"].item() == 4
    assert second.state[model.trunk.weight]["step"].item() == 1


def test_a_phase_boundary_between_equal_freezes_leaves_the_course_of_training_as_it_was() -> None:
    def train(num_steps_before: int) -> list[Tensor]:
        torch.manual_seed(3)
        model = Tiny()
        optimizer = optimizer_of(model, ["trunk.bias"])
        for _ in range(num_steps_before):
            step(model, optimizer)
        optimizer = optimizer_of(model, ["trunk.bias"], optimizer)
        for _ in range(6 - num_steps_before):
            step(model, optimizer)
        return [parameter.detach() for parameter in model.parameters()]

    for uninterrupted, interrupted in zip(train(0), train(4), strict=True):
        assert torch.equal(uninterrupted.view(torch.int32), interrupted.view(torch.int32))


def test_building_and_stepping_do_not_write_into_the_groups_that_were_given() -> None:
    model = Tiny()
    parameters = dict(model.named_parameters())
    config = OptimConfig(lr_schedule="cosine")
    groups = group_parameters(config, parameters, dict.fromkeys(parameters, 0.1))
    before = [sorted(group) for group in groups]
    optimizer = build_optimizer(groups)
    schedule = build_lr_schedule(config, optimizer, 4)
    for _ in range(4):
        step(model, optimizer)
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0)
    assert [group["lr"] for group in groups] == [0.1, 0.1]
    assert [sorted(group) for group in groups] == before


# --- the course of the rate


def factors(course: str, num_steps: int, num_more: int = 0) -> list[float]:
    """The factor of the rate at each step from 0 to `num_steps` (the last one is never trained with) and beyond."""
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = build_lr_schedule(OptimConfig(lr_schedule=course), optimizer, num_steps)
    found = []
    for _ in range(num_steps + 1 + num_more):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_constant_stays() -> None:
    assert factors("constant", 5) == [1.0] * 6


def test_cosine_goes_from_the_peak_to_nothing_through_these_points() -> None:
    assert factors("cosine", 4) == pytest.approx(
        [1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0.0], abs=1e-12
    )
    assert factors("cosine", 3) == pytest.approx([1.0, 0.75, 0.25, 0.0], abs=1e-12)
    assert factors("cosine", 1)[0] == 1.0


def test_one_cycle_climbs_from_a_twenty_fifth_to_the_peak_and_falls_to_nothing() -> None:
    course = factors("one-cycle", 20)
    # Up over 30 %, that is 6 steps; halfway up and down the cosine is in the middle.
    assert course[0] == pytest.approx(0.04)
    assert course[3] == pytest.approx((0.04 + 1.0) / 2)
    assert course[6] == 1.0
    assert course[13] == pytest.approx(0.5)
    assert course[20] == pytest.approx(0.0, abs=1e-12)
    assert course[:7] == sorted(course[:7])
    assert course[6:] == sorted(course[6:], reverse=True)
    assert all(0 < factor <= 1 for factor in course[:20])


def test_one_cycle_of_one_step_trains_at_the_start_and_of_two_reaches_the_peak() -> None:
    assert factors("one-cycle", 1)[:1] == pytest.approx([0.04])
    assert factors("one-cycle", 2) == pytest.approx([0.04, 1.0, 0.0], abs=1e-12)


@pytest.mark.parametrize("course", ["cosine", "one-cycle"])
def test_the_rate_does_not_rise_again_after_the_end(course: str) -> None:
    assert factors(course, 4, num_more=4)[4:] == pytest.approx([0.0] * 5, abs=1e-12)


@pytest.mark.parametrize("course", ["constant", "cosine", "one-cycle"])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7])
def test_no_step_of_any_course_is_trained_at_a_rate_of_zero(course: str, num_steps: int) -> None:
    assert all(0 < factor <= 1 for factor in factors(course, num_steps)[:num_steps])


def test_every_group_follows_the_course_from_its_own_peak() -> None:
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = build_optimizer([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.4}])
    schedule = build_lr_schedule(OptimConfig(lr_schedule="cosine"), optimizer, 2)
    optimizer.step()
    schedule.step()
    assert schedule.get_last_lr() == pytest.approx([0.05, 0.2])
