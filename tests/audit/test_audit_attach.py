"""Attaching to optimizers of all kinds, what is not proven, hazards, and the words of a finding."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from audit_loops import Normed, Tiny, X, found, freeze_by_hand, only, train, trainable, write_in_place
from mtl.audit import AuditError, GradientAudit, attach


def loop(model: nn.Module, optimizer: Any, num_steps: int = 8, after: Any = None) -> None:
    for step in range(1, num_steps + 1):
        (model(X) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if after is not None and step == 5:
            after()


class Wrapper:
    """Looks like an optimizer, and passes its steps on."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.wrapped = optimizer
        self.param_groups = optimizer.param_groups

    def step(self) -> None:
        self.wrapped.step()

    def zero_grad(self) -> None:
        self.wrapped.zero_grad()


class Chained(Wrapper):
    """Steps several optimizers, which it has in a list."""

    def __init__(self, *optimizers: Optimizer) -> None:
        self.several = list(optimizers)
        self.param_groups = [group for each in optimizers for group in each.param_groups]

    def step(self) -> None:
        for each in self.several:
            each.step()

    def zero_grad(self) -> None:
        for each in self.several:
            each.zero_grad()


class ByHand:
    """Steps parameters without any optimizer of torch."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.param_groups = [{"params": parameters, "lr": 0.05}]

    def step(self) -> None:
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter -= 0.05 * parameter.grad

    def zero_grad(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = None


class Skipping(Optimizer):
    """Does not call the constructor of its base class."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.param_groups = [{"params": parameters, "lr": 0.05}]

    def step(self) -> None:  # type: ignore[override]
        ByHand.step(self)  # type: ignore[arg-type]


def accelerated(model: nn.Module) -> Any:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.Accelerator(cpu=True).prepare(SGD(trainable(model), lr=0.05))


def lookahead(model: nn.Module) -> Any:
    from timm.optim import Lookahead

    return Lookahead(SGD(trainable(model), lr=0.05), k=3)


WRAPPED = {
    "accelerate": accelerated,
    "Lookahead": lookahead,
    "a duck-typed wrapper": lambda model: Wrapper(SGD(trainable(model), lr=0.05)),
    "a wrapper in a wrapper": lambda model: Wrapper(Wrapper(SGD(trainable(model), lr=0.05))),  # type: ignore[arg-type]
    "several in a list": lambda model: Chained(SGD([model.head.weight], lr=0.05), AdamW([model.head.bias], lr=0.05)),
    "a scheduler around its step": lambda model: scheduled(SGD(trainable(model), lr=0.05)),
}


def scheduled(optimizer: Optimizer) -> Optimizer:
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    return optimizer


@pytest.mark.parametrize("make", WRAPPED.values(), ids=WRAPPED)
def test_every_step_of_a_wrapped_optimizer_is_observed(make: Any) -> None:
    model = Tiny()
    optimizer = make(model)
    audit = attach(model, optimizer, freeze=["trunk"])
    loop(model, optimizer)
    audit.end()
    assert audit.report.ok
    assert (audit.report.phases[0].num_steps, audit.report.phases[0].num_trained) == (8, 2)


@pytest.mark.parametrize("make", WRAPPED.values(), ids=WRAPPED)
def test_a_write_below_a_wrapped_optimizer_is_found(make: Any) -> None:
    model = Tiny()
    optimizer = make(model)
    audit = attach(model, optimizer, freeze=["trunk"], policy="collect")
    loop(model, optimizer, after=lambda: write_in_place(model.trunk.weight))
    audit.end()
    assert [(v.kind, v.name, v.step) for v in audit.report.violations] == [("param_changed", "trunk.weight", 5)]


@pytest.mark.parametrize(
    "make", [ByHand, Skipping, lambda parameters: Wrapper(ByHand(parameters))], ids=["by hand", "skipping", "wrapped"]
)
def test_an_optimizer_whose_steps_cannot_be_observed_is_refused(make: Any) -> None:
    model = Tiny()
    with pytest.raises(
        TypeError, match=r"the steps of a \w+ cannot be observed.*call after_backward\(\) and after_step\(\)"
    ):
        attach(model, make(trainable(model)), freeze=["trunk"])


def test_a_wrapper_that_holds_more_than_what_it_wraps_is_refused() -> None:
    model = Tiny()
    wrapper = Wrapper(SGD([model.head.weight], lr=0.05))
    wrapper.param_groups = [*wrapper.param_groups, {"params": [model.head.bias], "lr": 0.05}]
    with pytest.raises(TypeError, match="wraps none that holds its parameters"):
        attach(model, wrapper, freeze=["trunk"])  # type: ignore[arg-type]


def test_such_an_optimizer_may_be_audited_by_calls_in_the_loop() -> None:
    model = Tiny()
    optimizer: Any = Skipping(trainable(model))
    optimizer.zero_grad = lambda: ByHand.zero_grad(optimizer)
    audit = GradientAudit(model, ["trunk"], [optimizer])
    with audit.phase("frozen"):
        train(audit, model, [optimizer], 6)
    assert audit.report.ok


# --- what is not proven


def test_backwards_without_a_step_that_was_observed_prove_nothing() -> None:
    model = Tiny()
    audit = GradientAudit(model, ["trunk"])
    with audit.phase("frozen"):
        for _ in range(2):
            model(X).sum().backward()
            audit.after_backward()
    assert audit.report.violations == []
    assert audit.report.phases[0].unproven == "2 backwards were observed, but no step"
    assert not audit.report.ok
    assert audit.report.to_json()["ok"] is audit.report.to_json()["phases"][0]["ok"] is False


def test_a_phase_without_a_loop_has_nothing_unproven() -> None:
    model = Tiny()
    audit = GradientAudit(model, ["trunk"])
    with audit.phase("evaluate only"):
        model(X)
    assert audit.report.ok


def test_an_audit_without_a_phase_has_proven_nothing() -> None:
    assert not GradientAudit(Tiny(), ["trunk"]).report.ok


def test_a_phase_that_an_exception_left_is_not_ok_although_it_was_caught() -> None:
    model = Tiny()
    optimizer = SGD(trainable(model), lr=0.1)
    audit = GradientAudit(model, ["trunk"], [optimizer])

    def stop() -> None:
        # After the last look, so that nobody sees it.
        model.trunk.weight.data.add_(1)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"), audit.phase("frozen"):
        train(audit, model, [optimizer], before_forward={3: stop})
    with audit.phase("the rest"):
        train(audit, model, [optimizer])
    assert [phase.ok for phase in audit.report.phases] == [False, True]
    assert audit.report.violations == []
    assert not audit.report.ok


# --- crashes of before


def test_an_uninitialised_lazy_layer_may_be_attached_to() -> None:
    model = Tiny()
    with warnings.catch_warnings(action="ignore"):
        model.head = nn.LazyLinear(1)
    optimizer = SGD(model.head.parameters(), lr=0.05)
    audit = attach(model, optimizer, freeze=["trunk"])
    loop(model, optimizer)
    audit.end()
    assert audit.report.ok


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("part", ["trunk", "head"])
def test_a_model_with_a_scripted_part_is_audited(part: str) -> None:
    model = Tiny()
    setattr(model, part, torch.jit.script(getattr(model, part)))
    optimizer = SGD(trainable(model), lr=0.05)
    audit = GradientAudit(model, ["trunk"], [optimizer], policy="collect")
    with audit.phase("clean"):
        train(audit, model, [optimizer], 4)
    assert audit.report.ok
    with audit.phase("written"):
        train(audit, model, [optimizer], 4, after_step={2: lambda: model.trunk.weight.data.add_(1)})
    assert ("param_changed", "trunk.weight") in {(v.kind, v.name) for v in audit.report.violations}


def test_a_frozen_tensor_that_wraps_others_is_read_through() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    model = Tiny()
    inner = torch.ones(2, 2), torch.ones(2, 2)
    model.trunk.weight = nn.Parameter(TwoTensor(*inner), requires_grad=False)
    audit = GradientAudit(model, ["trunk"], policy="collect")
    with audit.phase("clean"):
        audit.verify()
    assert audit.report.ok
    with audit.phase("written"):
        inner[1][0, 0] += 1
    assert found(audit.report) == [("param_changed", "trunk.weight", "written", 0)]


def test_a_frozen_tensor_that_cannot_be_read_is_refused_before_the_first_step() -> None:
    class Opaque(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(func, "__name__", "") == "to":
                raise NotImplementedError("no bytes here")
            return super().__torch_function__(func, types, args, kwargs or {})

    model = Tiny()
    model.trunk.register_buffer("opaque", torch.zeros(2).as_subclass(Opaque))
    audit = GradientAudit(model, ["trunk"])
    with pytest.raises(ValueError, match=r"trunk\.opaque is frozen, but .* cannot be read .*take it back with !trunk"):
        audit.begin("frozen")


# --- hazards


def test_a_hazard_is_warned_of_once_and_named_with_its_pattern() -> None:
    model = Tiny()
    optimizer = SGD(model.parameters(), lr=0.1)
    audit = GradientAudit(model, ["trunk"], [optimizer])
    with pytest.warns(UserWarning, match=r"^hazard: phase 'a', step 0, trunk\.weight: in_optimizer.*frozen by 'trunk'"):
        audit.begin("a")
    train(audit, model, [optimizer])
    audit.end()
    with audit.phase("b"):
        train(audit, model, [optimizer])
    assert audit.report.ok
    assert [(each.kind, each.phase) for each in audit.report.hazards] == [("in_optimizer", "a"), ("in_optimizer", "b")]


def test_under_collect_a_hazard_is_only_listed_and_under_strict_it_is_raised() -> None:
    model = Normed()
    freeze_by_hand(model.trunk)
    model.trunk[2].train()
    optimizer = SGD(trainable(model), lr=0.1)
    audit = GradientAudit(model, ["trunk"], [optimizer], policy="collect")
    with audit.phase("frozen"):
        train(audit, model, [optimizer])
    assert audit.report.ok
    assert [(each.kind, each.name) for each in audit.report.hazards] == [("active_dropout", "trunk.2")]
    with pytest.raises(AuditError, match=r"trunk\.2: active_dropout"):
        GradientAudit(model, ["trunk"], [optimizer], strict=True).begin("frozen")


# --- words


def test_the_pattern_that_froze_a_tensor_and_where_it_was_written_are_named() -> None:
    model = Normed()
    freeze_by_hand(model.trunk)
    optimizer = SGD(trainable(model), lr=0.1)
    audit = GradientAudit(model, optimizers=[optimizer], policy="collect")
    with audit.phase("frozen", ["trunk", "type:BatchNorm1d", "!head"], written_at=["a.yaml:3", "a.yaml:4", "a.yaml:5"]):
        model.trunk[0].weight.data.add_(1)
        model.trunk[1].running_mean.add_(1)
    assert {each.name: each.pattern for each in audit.report.violations} == {
        "trunk.0.weight": "'trunk' (a.yaml:3)",
        "trunk.1.running_mean": "'type:BatchNorm1d' (a.yaml:4)",
    }
    assert "; frozen by 'type:BatchNorm1d' (a.yaml:4); likely cause: " in str(audit.report.violations[1])


def test_the_headline_says_whether_the_freeze_was_broken_or_training() -> None:
    model = Tiny()
    audit = GradientAudit(model, ["trunk"], [SGD([model.head.weight], lr=0.1)])
    with pytest.raises(AuditError, match=r"^trainable parameters do not train:\n"):
        audit.begin("frozen")
    model.trunk.weight.grad = torch.ones(2, 2)
    with pytest.raises(AuditError, match=r"^the freeze was broken, and trainable parameters do not train:\n"):
        audit.begin("frozen")


def cause(model: nn.Module, optimizers: list[Optimizer], freeze: tuple[str, ...] = ("trunk",)) -> str:
    audit = GradientAudit(model, freeze, optimizers, policy="collect")
    with audit.phase("frozen"):
        train(audit, model, optimizers)
    return audit.report.violations[0].cause


def test_an_optimizer_of_a_copy_is_not_said_to_be_of_before_a_thaw() -> None:
    model = Tiny()
    assert cause(model, [SGD(trainable(copy.deepcopy(model)), lr=0.1)]).startswith("the optimizer holds other tensors")


def test_parameters_that_to_replaced_are_not_said_to_be_thawed() -> None:
    model = Tiny()
    optimizer = SGD(trainable(model), lr=0.1)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.double().float()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert cause(model, [optimizer]).startswith("the optimizer holds other tensors of its shape")


def test_a_parameter_that_was_never_frozen_is_not_said_to_be_thawed() -> None:
    model = Tiny()
    assert cause(model, [SGD([model.head.weight], lr=0.1)]).startswith("the optimizer was built without it")


def test_a_parameter_that_was_frozen_before_is_said_to_be_thawed() -> None:
    model = Tiny()
    optimizer = SGD(trainable(model), lr=0.1)
    audit = GradientAudit(model, ["trunk"], [optimizer], policy="collect")
    with audit.phase("frozen"):
        train(audit, model, [optimizer])
    model.trunk.requires_grad_(True)
    with audit.phase("thawed", freeze=[]):
        train(audit, model, [optimizer])
    assert only(audit.report).cause.startswith("thawed after the optimizer was built")


def test_a_buffer_that_is_written_in_eval_mode_is_not_blamed_on_the_mode() -> None:
    model = Tiny()
    model.trunk.register_buffer("scale", torch.ones(2))
    audit = GradientAudit(model, ["trunk"], policy="collect")
    with audit.phase("frozen"):
        model.trunk.scale.mul_(2)
    assert "keep the frozen module in eval mode" not in only(audit.report).cause
    assert only(audit.report).cause.startswith("code writes to this buffer though Linear is in eval mode")


def test_a_zero_gradient_of_fp16_is_said_to_be_underflow() -> None:
    model = Tiny().half()
    optimizer = SGD(trainable(model), lr=0.1)
    audit = GradientAudit(model, ["trunk"], [optimizer], policy="collect")
    with audit.phase("frozen"):
        for _ in range(8):
            ((model(X.half()) - 1).float().square().mean() * 1e-10).backward()
            audit.after_backward()
            optimizer.step()
            audit.after_step()
            optimizer.zero_grad()
    assert {(each.kind, each.name) for each in audit.report.violations} == {
        ("never_received_grad", "head.weight"),
        ("never_received_grad", "head.bias"),
    }
    assert all("in float16 a gradient below 6e-08 is zero" in each.cause for each in audit.report.violations)


def test_an_adapter_that_is_put_into_the_frozen_part_is_found_at_that_step() -> None:
    model = Tiny()
    optimizer = SGD(trainable(model), lr=0.1)
    audit = GradientAudit(model, ["trunk"], [optimizer], policy="collect")
    with audit.phase("frozen"):
        adapt = {4: lambda: model.trunk.add_module("adapter", nn.Linear(2, 2))}
        train(audit, model, [optimizer], 20, after_step=adapt)
    assert found(audit.report)[0] == ("identity_changed", "trunk.adapter.weight", "frozen", 4)
    assert audit.report.violations[0].cause.startswith("it was added after the phase began")


def test_no_hook_is_left_over_a_phase() -> None:
    from torch.nn.modules import module as torch_module

    registries = (
        torch_module._global_module_registration_hooks,
        torch_module._global_parameter_registration_hooks,
        torch_module._global_buffer_registration_hooks,
    )
    before = [len(each) for each in registries]
    model = Tiny()
    optimizer = SGD(trainable(model), lr=0.1)
    audit = attach(model, optimizer, freeze=["trunk"])
    assert [len(each) for each in registries] != before
    loop(model, optimizer, 2)
    audit.end()
    assert [len(each) for each in registries] == before
    assert not optimizer._optimizer_step_post_hooks and not optimizer._optimizer_step_pre_hooks
    assert all(not parameter._backward_hooks for parameter in trainable(model))


def test_an_optimizer_that_is_not_watched_cannot_be_left_out() -> None:
    model = Tiny()
    audit = GradientAudit(model, ["trunk"])
    with pytest.raises(ValueError, match="expected an optimizer that is watched"):
        audit.unwatch(SGD(trainable(model), lr=0.1))


def test_what_is_left_of_the_frozen_part_is_not_said_to_be_gone_with_the_rest() -> None:
    model = Tiny()
    model.aux = nn.Linear(2, 2).requires_grad_(False)
    optimizer = SGD(trainable(model), lr=0.1)
    audit = GradientAudit(model, ["trunk", "aux"], [optimizer], policy="collect")
    with audit.phase("frozen"):
        train(audit, model, [optimizer], after_step={2: lambda: delattr(model, "aux")})
    assert {each.name for each in audit.report.violations} == {"aux.weight", "aux.bias"}
    assert all(each.cause.startswith("the module or tensor was deleted") for each in audit.report.violations)


def test_an_optimizer_that_held_a_tensor_from_the_start_is_said_to_be_of_before_the_freeze() -> None:
    model = Tiny()
    model.trunk.requires_grad_(True)
    optimizer = SGD(model.parameters(), lr=0.1)
    audit = GradientAudit(model, ["trunk"], [optimizer], policy="collect")
    with audit.phase("frozen"):
        train(audit, model, [optimizer])
    causes = {each.kind: each.cause for each in audit.report.violations}
    assert causes["in_optimizer"].startswith("the optimizer was built before the freeze")


def test_a_passing_buffer_that_is_made_again_with_other_bytes_is_a_violation() -> None:
    model = Tiny()
    model.trunk.register_buffer("positions", torch.zeros(4), persistent=False)
    optimizer = SGD(trainable(model), lr=0.1)
    audit = GradientAudit(model, ["trunk"], [optimizer], policy="collect")
    with audit.phase("frozen"):
        again = {2: lambda: setattr(model.trunk, "positions", torch.ones(4))}
        train(audit, model, [optimizer], after_step=again)
    assert [(each.kind, each.name) for each in audit.report.violations] == [("identity_changed", "trunk.positions")]


def test_an_embedding_that_renormalises_is_named_as_that() -> None:
    model = nn.ModuleDict({"trunk": nn.Embedding(5, 2, max_norm=0.1), "head": nn.Linear(2, 1)})
    freeze_by_hand(model["trunk"])
    optimizer = SGD(model["head"].parameters(), lr=0.1)
    audit = GradientAudit(model, ["trunk"], [optimizer], policy="collect")
    with audit.phase("frozen"):
        model["head"](model["trunk"](torch.arange(3))).sum().backward()
        audit.after_backward()
        optimizer.step()
        audit.after_step()
    assert only(audit.report).cause.startswith("the forward of Embedding renormalises the rows")
