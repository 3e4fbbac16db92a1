"""What was meant to train and silently does not; windows in which nothing can be said yet."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from audit_loops import Tiny, X, found, only, train, trainable
from mtl.audit import GradientAudit, Report
from mtl.audit.watch.judgement import FEW, MANY, SOME


def follow(
    model: nn.Module, optimizers: Sequence[Optimizer], num_steps: int, idle: Sequence[str] = (), step: bool = True
) -> Report:
    audit = GradientAudit(model, ["trunk"], optimizers, policy="collect")
    with audit.phase("frozen", idle=idle):
        train(audit, model, optimizers if step else [], num_steps)
    return audit.report


class Spare(Tiny):
    """Has a second head that no loss depends on, unless `weight` says how much."""

    def __init__(self, weight: float | None = None) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 1, bias=False)
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out if self.weight is None else out + self.weight * self.spare(self.trunk(x))


@pytest.mark.parametrize(("num_steps", "expected"), [(SOME - 1, []), (SOME, ["spare.weight"])])
def test_a_head_without_any_gradient_is_named_once_the_phase_is_long_enough(
    num_steps: int, expected: list[str]
) -> None:
    model = Spare()
    report = follow(model, [SGD(trainable(model), lr=0.1)], num_steps)
    assert [(v.kind, v.name, v.since) for v in report.violations] == [
        ("never_received_grad", name, 0) for name in expected
    ]
    assert all("no loss depends on it" in violation.cause for violation in report.violations)


@pytest.mark.parametrize(("num_steps", "expected"), [(SOME - 1, []), (SOME, ["spare.weight"])])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_head_whose_gradient_is_always_zero_is_named_even_if_decay_moves_it(
    num_steps: int, expected: list[str], decay: float
) -> None:
    model = Spare(weight=0.0)
    report = follow(model, [SGD(trainable(model), lr=0.1, weight_decay=decay)], num_steps)
    assert [(v.kind, v.name) for v in report.violations] == [("never_received_grad", name) for name in expected]
    assert all(("only decay or momentum moved it" in v.detail) == bool(decay) for v in report.violations)


def test_what_is_named_idle_is_not_asked_to_train() -> None:
    model = Spare()
    assert follow(model, [SGD(trainable(model), lr=0.1)], 10, idle=["spare"]).ok


@pytest.mark.parametrize(("num_steps", "num_found"), [(FEW - 1, 0), (FEW, 2)])
def test_a_rate_of_zero_throughout_is_named(num_steps: int, num_found: int) -> None:
    model = Tiny()
    report = follow(model, [SGD(trainable(model), lr=0.0)], num_steps)
    assert [(v.kind, v.name) for v in report.violations] == [
        ("never_trained", "head.weight"),
        ("never_trained", "head.bias"),
    ][:num_found]
    assert all("learning rate 0" in violation.cause for violation in report.violations)


def test_an_optimizer_that_is_never_stepped_is_named_at_its_own_parameters_only() -> None:
    model = Tiny()
    forgotten, stepped = SGD([model.head.bias], lr=0.1), SGD([model.head.weight], lr=0.1)
    audit = GradientAudit(model, ["trunk"], [forgotten, stepped], policy="collect")
    with audit.phase("frozen"):
        train(audit, model, [stepped], 4)
    assert [(v.kind, v.name) for v in audit.report.violations] == [("never_trained", "head.bias")]
    assert "step() of its optimizer was never called" in only(audit.report).cause


def test_a_gradient_that_is_cleared_before_the_step_is_named() -> None:
    model = Tiny()
    optimizer = SGD(trainable(model), lr=0.1)
    audit = GradientAudit(model, ["trunk"], [optimizer], policy="collect")
    with audit.phase("frozen"):
        for _ in range(4):
            model(X).sum().backward()
            audit.after_backward()
            optimizer.zero_grad()
            optimizer.step()
            audit.after_step()
    assert {(v.kind, v.name) for v in audit.report.violations} == {
        ("never_trained", "head.weight"),
        ("never_trained", "head.bias"),
    }
    assert all(
        "zero_grad() came between backward() and step()" in violation.cause for violation in audit.report.violations
    )


def test_a_layer_that_the_freeze_catches_by_mistake_is_named() -> None:
    model = nn.ModuleDict({"layer1": nn.Linear(2, 2), "layer10": nn.Linear(2, 1)})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layer1" not in name or name == "layer10.bias")
    optimizer = SGD([model["layer10"].bias], lr=0.1)
    audit = GradientAudit(model, ["layer1"], [optimizer], policy="collect")
    with audit.phase("frozen"):
        model["layer10"](model["layer1"](X)).sum().backward()
        audit.after_backward()
        optimizer.step()
        audit.after_step()
    assert found(audit.report) == [("never_trained", "layer10.weight", "frozen", 1)]
    assert only(audit.report).cause.startswith("requires_grad was left off")


@pytest.mark.parametrize(
    ("spell", "words"),
    [
        (lambda model: setattr(model.head, "requires_grad", True), "`requires_grad = ...` was set on a Linear"),
        (lambda model: setattr(model.head.weight, "require_grad", True), "`require_grad = ...` was set, which torch"),
    ],
    ids=["module", "typo"],
)
def test_a_thaw_that_torch_does_not_read_is_named_as_such(spell: object, words: str) -> None:
    model = Tiny()
    model.head.weight.requires_grad_(False)
    spell(model)  # type: ignore[operator]
    report = follow(model, [SGD(trainable(model), lr=0.1)], 2)
    assert found(report) == [("never_trained", "head.weight", "frozen", 2)]
    assert only(report).cause.startswith(words)


@pytest.mark.parametrize(
    ("spell", "words"),
    [
        (lambda model: setattr(model.trunk, "requires_grad", False), "`requires_grad = ...` was set on a Linear"),
        (lambda model: setattr(model.trunk.weight, "requires_gard", False), "`requires_gard = ...` was set"),
    ],
    ids=["module", "typo"],
)
def test_a_freeze_that_torch_does_not_read_is_named_as_such(spell: object, words: str) -> None:
    model = Tiny()
    model.trunk.requires_grad_(True)
    spell(model)  # type: ignore[operator]
    audit = GradientAudit(model, ["trunk"], policy="collect")
    with audit.phase("frozen"):
        pass
    (hazard,) = audit.report.hazards
    assert (hazard.kind, hazard.name) == ("requires_grad", "trunk.weight")
    assert hazard.cause.startswith(words)


def test_a_head_in_a_python_list_and_a_plain_tensor_are_named_as_left_out() -> None:
    model = Tiny()
    model.heads = [nn.Linear(2, 1, bias=False)]  # type: ignore[assignment]
    model.scale = torch.ones(1, requires_grad=True)
    optimizer = SGD(trainable(model), lr=0.1)
    audit = GradientAudit(model, ["trunk"], [optimizer], policy="collect")
    with audit.phase("frozen"):
        for _ in range(2):
            (model(X) + model.heads[0](X) * model.scale).sum().backward()  # type: ignore[index]
            audit.after_backward()
            optimizer.step()
            audit.after_step()
            optimizer.zero_grad()
    causes = {violation.name: violation.cause for violation in audit.report.violations}
    assert {v.kind for v in audit.report.violations} == {"not_in_optimizer"}
    assert causes.keys() == {"scale", "heads.0.weight"}
    assert "nn.ModuleList" in causes["heads.0.weight"] and "nn.Parameter" in causes["scale"]


def test_a_parameter_in_two_groups_is_named() -> None:
    model = Tiny()
    optimizers = [SGD(trainable(model), lr=0.1), SGD([model.head.bias], lr=0.1)]
    assert found(follow(model, optimizers, 0)) == [("in_several_groups", "head.bias", "frozen", 0)]


def test_a_loss_that_learns_but_is_in_no_optimizer_is_named_if_it_is_given() -> None:
    model, criterion = Tiny(), nn.ParameterDict({"log_variance": nn.Parameter(torch.zeros(1))})
    optimizer = SGD(trainable(model), lr=0.1)
    audit = GradientAudit(model, ["trunk"], [optimizer], policy="collect", also={"loss": criterion})
    with audit.phase("frozen"):
        pass
    assert found(audit.report) == [("not_in_optimizer", "loss.log_variance", "frozen", 0)]


@pytest.mark.parametrize(("num_steps", "expected"), [(MANY - 1, []), (MANY, ["spare.weight"])])
def test_where_tasks_are_drawn_a_head_is_given_more_steps(num_steps: int, expected: list[str]) -> None:
    model = Spare()
    model.other = nn.Linear(2, 1, bias=False)
    optimizer = SGD(trainable(model), lr=0.01)
    audit = GradientAudit(model, ["trunk"], [optimizer], policy="collect")
    with audit.phase("frozen"):
        for step in range(num_steps):
            out = model.other(X) if step == 4 else model(X)
            out.square().mean().backward()
            audit.after_backward()
            optimizer.step()
            audit.after_step()
            optimizer.zero_grad()
    assert [(v.kind, v.name) for v in audit.report.violations] == [("never_received_grad", name) for name in expected]


def test_nothing_is_asked_of_what_is_trained_if_no_optimizer_is_known() -> None:
    model = Tiny()
    assert follow(model, [], 10).ok
