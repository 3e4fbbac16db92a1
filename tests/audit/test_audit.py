"""The audit: policies, attaching, phases and the report."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from audit_loops import (
    Fault,
    Tiny,
    X,
    found,
    freeze_by_hand,
    run,
    silent,
    train,
    trainable,
    write_in_place,
    write_numpy_alias,
    write_smallest_bit,
)
from mtl.audit import AuditError, GradientAudit, PhaseRecord, attach, fingerprint
from mtl.freeze import enforce, plan_freeze, trainable_parameters
from mtl.patterns import PatternError

# --- policies


def test_the_policy_raise_stops_at_the_step_of_the_fault_and_carries_the_violation() -> None:
    model = Tiny()
    optimizer = SGD(trainable(model), lr=0.1)
    audit = GradientAudit(model, ["trunk"], [optimizer])
    message = (
        r"^the freeze was broken:\n  phase 'frozen', step 2, trunk\.weight: param_changed: its bytes differ from the"
        r" original ones \(by up to 3, in 75\.0% of the elements\); frozen by 'trunk';"
        r" likely cause: written outside the watched optimizers"
    )
    with pytest.raises(AuditError, match=message) as caught, audit.phase("frozen"):
        train(audit, model, [optimizer], after_step={2: lambda: write_in_place(model.trunk.weight)})
    assert caught.value.violations == audit.report.violations == audit.report.phases[0].violations
    assert audit.report.phases[0].num_steps == 2
    assert not audit.report.phases[0].completed


def test_the_policy_raise_does_not_let_a_broken_phase_begin() -> None:
    model = Tiny()
    audit = GradientAudit(model, ["trunk"], [SGD(model.parameters(), lr=0.1)], strict=True)
    entered = []
    with (
        pytest.raises(AuditError, match=r"step 0, trunk\.weight: in_optimizer"),
        audit.phase("frozen"),
    ):
        entered.append(True)
    assert entered == []
    assert not audit.report.ok


def test_the_policy_warn_warns_once_and_continues() -> None:
    model = Tiny()
    optimizer = SGD(trainable(model), lr=0.1)
    audit = GradientAudit(model, ["trunk"], [optimizer], policy="warn")
    with pytest.warns(UserWarning) as caught, audit.phase("frozen"):
        train(audit, model, [optimizer], num_steps=4, after_step={2: lambda: write_in_place(model.trunk.weight)})
    assert [str(warning.message) for warning in caught] == [str(audit.report.violations[0])]
    assert str(caught[0].message).startswith("phase 'frozen', step 2, trunk.weight: param_changed")
    assert audit.report.phases[0].num_steps == 4
    assert audit.report.phases[0].completed


def test_the_policy_collect_says_nothing_and_continues() -> None:
    model = Tiny()
    report = run(model, num_steps=4, after_step={2: lambda: write_in_place(model.trunk.weight)})
    assert not report.ok
    assert report.phases[0].num_steps == 4
    assert report.phases[0].completed


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="expected the policy raise, warn, collect or restore, got 'ignore'"):
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
    audit = GradientAudit(model, ["trunk"], strict=True)
    with (
        pytest.raises(
            AuditError, match=r"8 tensors \(trunk\.0\.weight, trunk\.0\.bias, trunk\.1\.weight and 5 more\)"
        ) as caught,
        audit.phase("frozen"),
    ):
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


class WithStatistics(nn.Module):
    """A frozen trunk with statistics under a head."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.head = nn.Linear(2, 1)
        freeze_by_hand(self.trunk)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))


def bits(module: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in module.state_dict().items()}


def test_the_policy_restore_puts_bits_flags_and_modes_back_records_it_and_continues() -> None:
    faults: list[tuple[str, Fault, str]] = []
    for kind, fault in [
        ("param_changed", lambda model: write_in_place(model.trunk[0].weight)),
        ("buffer_changed", lambda model: model.trunk[1].running_mean.fill_(7.0)),
        ("buffer_changed", lambda model: model.train()),
        ("grad_present", lambda model: model.trunk[0].weight.requires_grad_(True)),
        ("grad_present", lambda model: setattr(model.trunk[0].bias, "grad", torch.ones(2))),
    ]:
        faults.append((kind, fault, kind))
    for kind, fault, _ in faults:
        torch.manual_seed(0)
        model = WithStatistics()
        before = bits(model.trunk)
        optimizer = SGD(trainable(model), lr=0.1)
        audit = GradientAudit(model, ["trunk"], [optimizer], policy="restore")
        with warnings.catch_warnings(action="ignore"), audit.phase("frozen"):
            train(audit, model, [optimizer], num_steps=4, after_step={2: lambda f=fault, m=model: f(m)})
        assert bits(model.trunk) == before, kind
        assert kind in {violation.kind for violation in audit.report.violations}, kind
        assert not audit.report.ok and audit.report.phases[0].completed
        assert not model.trunk[1].training and not any(p.requires_grad for p in model.trunk.parameters())
        assert all(parameter.grad is None for parameter in model.trunk.parameters())


def test_the_policy_restore_trains_the_rest_to_the_same_bits_as_without_the_fault() -> None:
    ends = []
    for fault in (lambda _: None, lambda model: write_in_place(model.trunk.weight)):
        torch.manual_seed(0)
        model = Tiny()
        optimizer = SGD(trainable(model), lr=0.1)
        audit = GradientAudit(model, ["trunk"], [optimizer], policy="restore")
        with audit.phase("frozen"):
            train(audit, model, [optimizer], after_step={2: lambda f=fault, m=model: f(m)})
        ends.append(bits(model))
    assert ends[0] == ends[1]


def test_tensors_that_share_kind_and_cause_share_a_line() -> None:
    model = nn.ModuleDict({f"layer{number}": nn.Linear(2, 2) for number in range(31)})
    optimizer = SGD(model.parameters(), lr=0.1)
    audit = GradientAudit(model, ["**"], [optimizer], strict=True)
    with pytest.raises(AuditError) as caught, audit.phase("all"):
        pass
    assert len(caught.value.violations) == 2 * 62  # each asks for a gradient, and is held by the optimizer
    head, *lines = str(caught.value).splitlines()
    names = "62 tensors (layer0.weight, layer0.bias, layer1.weight and 59 more)"
    assert head == "the freeze was broken:"
    assert [line.split(": ")[:2] for line in lines] == [
        [f"  phase 'all', step 0, {names}", "requires_grad"],
        [f"  phase 'all', step 0, {names}", "in_optimizer"],
    ]


# --- attached


@pytest.mark.parametrize("kind", [SGD, AdamW, torch.optim.Adam, torch.optim.RMSprop])
def test_an_attached_audit_needs_no_call_in_the_loop(kind: type[Optimizer]) -> None:
    model = Tiny()
    optimizer = kind(trainable(model), lr=0.1)  # type: ignore[call-arg]
    audit = GradientAudit(model, ["trunk"])
    audit.attach(optimizer)

    def loop(fault: Fault | None = None) -> None:
        for step in range(3):
            (model(X) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if fault is not None and step == 1:
                fault()

    loop()  # outside a phase nothing is looked at
    with audit.phase("clean"):
        loop()
    assert audit.report.ok and audit.report.phases[0].num_steps == 3
    with (
        pytest.raises(AuditError, match=r"phase 'broken', step 2, trunk\.weight: param_changed"),
        audit.phase("broken"),
    ):
        loop(lambda: write_in_place(model.trunk.weight))


def test_attached_to_two_optimizers_each_step_is_counted_once() -> None:
    model = Tiny()
    first, second = SGD([model.head.weight], lr=0.1), AdamW([model.head.bias], lr=0.1)
    audit = GradientAudit(model, ["trunk"])
    audit.attach(first, second)
    with audit.phase("frozen"):
        for _ in range(3):
            (model(X) - 1).square().mean().backward()
            for optimizer in (first, second):
                optimizer.step()
                optimizer.zero_grad()
    assert audit.report.ok and audit.report.phases[0].num_steps == 3


def test_an_attached_audit_names_a_gradient_before_the_optimizer_can_use_it() -> None:
    model = Tiny()
    optimizer = SGD(model.parameters(), lr=0.1)
    audit = GradientAudit(model, ["trunk"], policy="collect")
    audit.attach(optimizer)
    with audit.phase("frozen"):
        model.trunk.weight.grad = torch.ones(2, 2)
        optimizer.step()
    assert ("grad_present", "trunk.weight", "frozen", 0) in found(audit.report)


def test_attach_audits_a_loop_that_knows_nothing_of_it_and_leaves_no_hook() -> None:
    model = Tiny()
    optimizer = SGD(trainable(model), lr=0.1)
    audit = attach(model, optimizer, freeze=["trunk"], phase="theirs")
    for _ in range(7):
        (model(X) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    audit.end()
    silent(audit.report, num_steps=7)
    assert [phase.name for phase in audit.report.phases] == ["theirs"]
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_phase_that_was_ended_by_hand_inside_its_block_is_proven() -> None:
    model = Tiny()
    audit = GradientAudit(model, ["trunk"])
    with audit.phase("by hand"):
        audit.end()
    assert [phase.completed for phase in audit.report.phases] == [True]


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
        # One look a step in the rotation, one at the end.
        "checks": {"steps": 2, "tripwires": 4, "fingerprints": 3},
        "unproven": "",
        "violations": [],
        "hazards": [],
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
            "detail": "its bytes differ from the original ones",
            "since": 0,
            "max_abs": 3.0,
            "share": 0.75,
            "pattern": "'trunk'",
        }
    ]


def test_a_root_changes_with_the_bytes_after_it() -> None:
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
    audit = GradientAudit(model, ["trunk"], [optimizer], policy="collect")
    with audit.phase("frozen") as record:
        train(audit, model, [optimizer])
    assert (record.num_trainable, record.num_trained) == (2, 1)


# --- wrapped


def wrappers() -> list[tuple[str, Callable[[nn.Module], nn.Module]]]:
    return [
        ("DataParallel", nn.DataParallel),
        ("DDP", nn.parallel.DistributedDataParallel),
        ("torch.compile", lambda model: torch.compile(model, backend="eager")),
        ("both", lambda model: torch.compile(nn.parallel.DistributedDataParallel(model), backend="eager")),
    ]


@pytest.fixture
def one_process() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("name", "wrap"), wrappers(), ids=[name for name, _ in wrappers()])
@pytest.mark.usefixtures("one_process")
def test_a_wrapped_model_is_frozen_and_audited_under_its_own_names(
    name: str, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    model = Tiny()
    wrapped = wrap(model)
    plan = plan_freeze(wrapped, ["trunk"])
    enforce(wrapped, plan)
    parameters = trainable_parameters(wrapped, plan)
    assert plan.names.frozen == ("trunk.weight",) and {*parameters} == {"head.weight", "head.bias"}, name
    optimizer = SGD(parameters.values(), lr=0.1)
    audit = GradientAudit(wrapped, ["trunk"], [optimizer], policy="collect")
    with audit.phase("clean"):
        train(audit, model, [optimizer])
    assert audit.report.ok and {*audit.report.phases[0].fingerprints} == {"trunk.weight"}
    with audit.phase("broken"):
        train(audit, model, [optimizer], after_step={1: lambda: write_in_place(model.trunk.weight)})
    assert [(v.kind, v.name) for v in audit.report.violations] == [("param_changed", "trunk.weight")]
