"""An audit that is stopped anywhere, and resumes in another process, reports what one reports that never stopped."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from audit_loops import Tiny, freeze_by_hand, trainable, write_in_place, write_smallest_bit
from mtl.audit import AuditError, GradientAudit
from mtl.audit.watch.judgement import MANY

State = dict[str, Any]


class Net(nn.Module):
    """A trunk of convolution, BatchNorm and a counter after it; one head in use and one that may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2))
        self.neck = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        self.head = nn.Linear(3, 1)
        self.other = nn.Linear(3, 1)

    def forward(self, x: Tensor, other: float) -> Tensor:
        features = self.neck(self.trunk(x).mean((2, 3)))
        return self.head(features) + (other * self.other(features) if other else 0)


Faults = dict[tuple[int, int], Callable[["Run"], object]]


class Run:
    """A loop of two phases, which can be saved before any of their steps, and be built again from that."""

    phases = (("first", ["trunk", "neck"]), ("second", ["trunk"]))

    def __init__(self, kind: str, num_steps: int, faults: Faults, saved: State | None = None) -> None:
        torch.manual_seed(0)
        self.kind, self.num_steps, self.faults, self.saved = kind, num_steps, faults, saved
        self.net = Net()
        self.inputs = torch.randn(len(self.phases), num_steps, 4, 1, 3, 3)
        self.weight_of_other: Callable[[int], float] = lambda _: 1.0
        self.states: dict[tuple[int, int], State] = {}
        self.audit = GradientAudit(self.net, policy="collect")
        if saved is not None:
            self.net.load_state_dict(saved["net"])
            self.audit.load_state_dict(json.loads(saved["audit"]))

    def enter(self, phase: int) -> None:
        self.net.train().requires_grad_()
        for name in self.phases[phase][1]:
            freeze_by_hand(self.net.get_submodule(name))
        some, rest = [*self.net.neck.parameters(), *self.net.head.parameters()], [*self.net.other.parameters()]
        held = [[p for p in group if p.requires_grad] for group in (some, rest)]
        self.optimizers: list[Optimizer]
        if self.kind == "sgd":
            self.optimizers = [SGD([{"params": held[0]}, {"params": held[1], "lr": 0.01}], lr=0.1, momentum=0.9)]
        else:
            self.optimizers = [(SGD if self.kind == "attached" else AdamW)(held[0], lr=0.01), AdamW(held[1], lr=0.01)]

    def go(self, saves: Sequence[tuple[int, int]] = ()) -> Run:
        """Runs to the end, and keeps what a checkpoint would hold at some (phase, step)."""
        start = (0, 0) if self.saved is None else self.saved["at"]
        for phase in range(start[0], len(self.phases)):
            self.enter(phase)
            if self.saved is not None and phase == start[0]:
                self.net.trunk.train(self.saved["trunk_trains"])
                for optimizer, state in zip(self.optimizers, self.saved["optimizers"], strict=True):
                    optimizer.load_state_dict(state)
            if self.kind == "attached":
                self.audit.attach(*self.optimizers)
            self.audit.begin(*self.phases[phase], self.optimizers)
            for step in range(start[1] if phase == start[0] else 0, self.num_steps):
                if (phase, step) in saves:
                    self.states[phase, step] = self.save(phase, step)
                self.step(phase, step)
            self.audit.end()
        return self

    def step(self, phase: int, step: int) -> None:
        self.net(self.inputs[phase, step], self.weight_of_other(step)).square().mean().backward()
        if self.kind != "attached":
            self.audit.after_backward()
        self.faults.get((phase, step), lambda _: None)(self)
        for optimizer in self.optimizers:
            optimizer.step()
        if self.kind != "attached":
            self.audit.after_step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        if step % 3 == 2:
            self.audit.verify()

    def save(self, phase: int, step: int) -> State:
        self.audit.verify(counted=False)
        return {
            "at": (phase, step),
            "net": copy.deepcopy(self.net.state_dict()),
            "trunk_trains": self.net.trunk.training,
            "optimizers": [copy.deepcopy(optimizer.state_dict()) for optimizer in self.optimizers],
            "audit": json.dumps(self.audit.state_dict(), allow_nan=False),
        }


def one_bit(run: Run) -> None:
    write_smallest_bit(run.net.trunk[0].weight.view(2, 4))  # type: ignore[arg-type]


def statistics(run: Run) -> None:
    run.net.trunk[1].running_mean += 1  # type: ignore[operator]


def past_the_count(run: Run) -> None:
    run.net.trunk[0].bias.data += 1  # type: ignore[operator, union-attr]


def in_train_mode(run: Run) -> None:
    run.net.trunk.train()


def rewritten(run: Run) -> None:
    """Not a violation: the same bits are written."""
    with torch.no_grad():
        run.net.trunk[0].weight.mul_(1)  # type: ignore[operator]


NUM_STEPS = 6
STOPS = [(phase, step) for phase in (0, 1) for step in range(NUM_STEPS)]
FAULTS: dict[str, Faults] = {
    "nothing": {},
    "a bit before most stops": {(0, 1): one_bit},
    "statistics and a mode": {(0, 2): statistics, (1, 1): in_train_mode, (1, 3): statistics},
    "past torch's count, late": {(1, 5): past_the_count},
    "the same bits are written": {(0, 2): rewritten, (1, 4): rewritten},
}


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("kind", ["sgd", "adamw", "attached"])
def test_the_report_of_a_run_stopped_at_any_step_is_that_of_one_never_stopped(kind: str, faults: Faults) -> None:
    expected = Run(kind, NUM_STEPS, faults).go().audit.report.to_json()
    assert expected["ok"] == all(fault is rewritten for fault in faults.values())
    assert [phase["checks"]["steps"] for phase in expected["phases"]] == [NUM_STEPS, NUM_STEPS]
    for stop, state in Run(kind, NUM_STEPS, faults).go(saves=STOPS).states.items():
        assert Run(kind, NUM_STEPS, faults, state).go().audit.report.to_json() == expected, stop


def test_stopped_at_every_step_in_turn_the_report_is_the_same_still() -> None:
    # Faults that are seen in their step: others are found when a state is taken, if their turn has not come before.
    faults: Faults = {(0, 2): statistics, (1, 3): one_bit}
    expected = Run("sgd", NUM_STEPS, faults).go().audit.report.to_json()
    run = Run("sgd", NUM_STEPS, faults)
    for stop in STOPS:
        run = Run("sgd", NUM_STEPS, faults, run.go(saves=[stop]).states[stop])
    assert run.go().audit.report.to_json() == expected


def test_the_report_does_not_depend_on_when_a_checkpoint_was_written() -> None:
    faults: Faults = {(0, 2): rewritten, (1, 2): statistics}
    reports = [Run("adamw", NUM_STEPS, faults).go(saves).audit.report.to_json() for saves in ([], STOPS)]
    assert reports[0] == reports[1]


# --- what did not train


class Followed(Run):
    """One phase, long enough to be judged, with a second head whose part in the loss differs from step to step."""

    phases = (("long", ["trunk", "neck"]),)

    def __init__(self, case: str, num_steps: int, saved: State | None = None) -> None:
        super().__init__("adamw" if case == "rate" else "sgd", num_steps, {}, saved)
        self.weight_of_other = {
            "early only": lambda step: float(step < 4),
            "stopped": lambda step: float(step < 12),
            "never": lambda _: 0.0,
            "zero": lambda _: 1e-50,
            "rate": lambda _: 1.0,
        }[case]
        self.case = case

    def enter(self, phase: int) -> None:
        super().enter(phase)
        if self.case == "rate":
            self.optimizers[1].param_groups[0]["lr"] = 0.0


FINDINGS = [
    ("early only", 10, [], (3, 5)),
    ("stopped", 12 + MANY, ["stopped_training"], (5, 11, 12, 13, 40, 61)),
    ("never", 8, ["never_received_grad"], (0, 3, 7)),
    ("zero", 8, ["never_received_grad"], (0, 3, 7)),
    ("rate", 5, ["never_trained"], (0, 3, 4)),
]


@pytest.mark.parametrize(("case", "num_steps", "kinds", "stops"), FINDINGS, ids=[each[0] for each in FINDINGS])
def test_what_did_not_train_is_judged_by_the_steps_before_the_stop_as_well(
    case: str, num_steps: int, kinds: list[str], stops: Sequence[int]
) -> None:
    whole = Followed(case, num_steps).go().audit.report
    assert [(v.kind, v.name) for v in whole.violations] == [
        (kind, name) for kind in kinds for name in ("other.weight", "other.bias")
    ]
    states = Followed(case, num_steps).go(saves=[(0, stop) for stop in stops]).states
    assert len(states) == len(stops)
    for stop, state in states.items():
        assert Followed(case, num_steps, state).go().audit.report.to_json() == whole.to_json(), stop


# --- what happened while it was stopped


def stopped(
    policy: str = "collect", verified: bool = True, before: Callable[[Tiny], object] = bool
) -> tuple[State, State]:
    """The state of an audit and of a model after two steps."""
    model = Tiny()
    optimizer = SGD(trainable(model), lr=0.1)
    audit = GradientAudit(model, ["trunk"], [optimizer], policy=policy)  # type: ignore[arg-type]
    audit.begin("frozen")
    for _ in range(2):
        step(audit, model, optimizer)
    before(model)
    if verified:
        audit.verify(counted=False)
    state: State = json.loads(json.dumps(audit.state_dict()))
    return state, model.state_dict()


def step(audit: GradientAudit, model: Tiny, optimizer: Optimizer) -> None:
    model(torch.ones(1, 2)).sum().backward()
    audit.after_backward()
    optimizer.step()
    audit.after_step()
    optimizer.zero_grad()


def resumed(state: State, tensors: State, policy: str = "collect") -> tuple[GradientAudit, Tiny, Optimizer]:
    model = Tiny()
    model.load_state_dict(tensors)
    optimizer = SGD(trainable(model), lr=0.1)
    audit = GradientAudit(model, ["trunk"], [optimizer], policy=policy)  # type: ignore[arg-type]
    audit.load_state_dict(state)
    return audit, model, optimizer


def test_a_bit_flipped_while_the_run_was_stopped_is_found_at_once_and_recorded_once() -> None:
    state, tensors = stopped()
    write_smallest_bit(tensors["trunk.weight"])
    audit, model, optimizer = resumed(state, tensors)
    record = audit.begin("frozen")
    step(audit, model, optimizer)
    audit.end()
    assert [(v.kind, v.name, v.step, v.since) for v in record.violations] == [("param_changed", "trunk.weight", 2, 2)]
    assert record.violations[0].cause.startswith("it was changed while the run was stopped (")
    assert record.num_steps == 3 and record.completed and not audit.report.ok


def test_a_bit_flipped_while_the_run_was_stopped_ends_it_under_the_policy_raise() -> None:
    state, tensors = stopped("raise")
    write_smallest_bit(tensors["trunk.weight"])
    audit, _, _ = resumed(state, tensors, "raise")
    with pytest.raises(AuditError, match=r"step 2, trunk\.weight: param_changed: .*while the run was stopped \("):
        audit.begin("frozen")
    assert len(audit.report.phases) == 1 and not audit.report.phases[0].completed


def test_a_change_that_may_have_come_before_the_stop_is_not_put_down_to_it_alone() -> None:
    def write(model: Tiny) -> None:
        model.trunk.weight.detach().numpy()[...] += 1

    state, tensors = stopped(verified=False, before=write)
    audit, _, _ = resumed(state, tensors)
    record = audit.begin("frozen")
    [violation] = record.violations
    assert violation.cause.startswith("it was changed while the run was stopped, or unobserved shortly before;")


def test_a_change_that_was_recorded_before_the_stop_is_not_recorded_again() -> None:
    state, tensors = stopped(before=lambda model: write_in_place(model.trunk.weight))
    audit, model, optimizer = resumed(state, tensors)
    record = audit.begin("frozen")
    step(audit, model, optimizer)
    audit.end()
    assert [(v.kind, v.name) for v in record.violations] == [("param_changed", "trunk.weight")]
    assert "stopped" not in record.violations[0].cause


def test_the_state_handles_by_policy_what_is_found_when_it_is_taken() -> None:
    with pytest.raises(AuditError, match="param_changed"):
        stopped("raise", before=lambda model: write_in_place(model.trunk.weight))


# --- what cannot resume


@pytest.mark.parametrize(
    ("name", "freeze", "idle", "message"),
    [
        ("thawed", ["trunk"], [], "the state was taken inside the phase 'frozen'"),
        ("frozen", ["head"], [], "expected the pattern 'trunk', got the pattern 'head'"),
        ("frozen", ["trunk", "head.bias"], [], "expected no further pattern, got the pattern 'head.bias'"),
        ("frozen", ["trunk"], ["head.bias"], "head.bias was trainable, and is not now"),
    ],
)
def test_a_state_of_another_phase_or_contract_is_refused_and_the_right_one_can_still_begin(
    name: str, freeze: list[str], idle: list[str], message: str
) -> None:
    audit, _, _ = resumed(*stopped())
    with pytest.raises(ValueError, match=f"the phase '{name}' cannot be resumed: {message}"):
        audit.begin(name, freeze, idle=idle)
    assert audit.report.phases == []
    assert audit.begin("frozen").num_steps == 2


def test_a_state_of_another_model_or_of_other_optimizers_is_refused() -> None:
    state, _ = stopped()
    model = Tiny()
    model.trunk.register_buffer("extra", torch.zeros(1))
    audit = GradientAudit(model, ["trunk"], [SGD(trainable(model), lr=0.1)])
    audit.load_state_dict(state)
    with pytest.raises(ValueError, match=r"trunk\.extra was not frozen, and is now"):
        audit.begin("frozen")
    audit = GradientAudit(Tiny(), ["trunk"])
    audit.load_state_dict(state)
    with pytest.raises(ValueError, match=r"its optimizers had \[1\] param groups, and have \[\] now"):
        audit.begin("frozen")


def test_a_state_is_loaded_before_any_phase_and_only_in_a_known_format() -> None:
    audit, _, _ = resumed(*stopped())
    with pytest.raises(ValueError, match="expected an audit's state of format 1, got 2"):
        audit.load_state_dict({"format": 2})
    audit.begin("frozen")
    with pytest.raises(RuntimeError, match="expected an audit without phases"):
        audit.load_state_dict({"format": 1})


def test_a_state_between_phases_and_one_that_no_phase_took_up_yet_are_passed_on() -> None:
    state, tensors = stopped()
    audit, _, _ = resumed(state, tensors)
    assert audit.state_dict() == state
    audit.begin("frozen")
    audit.end()
    between = json.loads(json.dumps(audit.state_dict()))
    assert between["open"] is None
    later, _, _ = resumed(between, tensors)
    assert later.report.to_json() == audit.report.to_json() and later.report.ok


@pytest.mark.parametrize("counted", [True, False])
def test_a_verify_after_the_last_step_makes_sure_that_nothing_was_changed_before_the_stop(counted: bool) -> None:
    state, tensors = stopped(verified=False)
    audit, model, optimizer = resumed(state, tensors)
    audit.begin("frozen")
    step(audit, model, optimizer)
    audit.verify(counted=counted)
    write_smallest_bit(tensors["trunk.weight"])
    again, _, _ = resumed(json.loads(json.dumps(audit.state_dict())), tensors)
    [violation] = again.begin("frozen").violations
    assert (violation.step, violation.since) == (3, 3)
    assert violation.cause.startswith("it was changed while the run was stopped (")
