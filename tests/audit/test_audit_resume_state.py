"""Every part of an audit's state counts: loops whose report would be another one if that part were lost at the stop."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from audit_loops import X, freeze_by_hand
from mtl.audit import GradientAudit
from mtl.audit.watch.judgement import FEW


class Net(nn.Module):
    """A frozen trunk with a buffer under two heads, and one that is used if `weight` is not 0."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
        self.head = nn.Linear(2, 1)
        self.late = nn.Linear(2, 1)
        self.unused = nn.Linear(2, 1)
        freeze_by_hand(self.trunk)
        self.late_weight = 1.0

    def forward(self, x: Tensor) -> Tensor:
        features = self.trunk(x)
        return self.head(features) + (self.late_weight * self.late(features) if self.late_weight else 0)


Act = Callable[["Loop", int], object]


def nothing(loop: Loop, step: int) -> None:
    """No action."""


@dataclass
class Loop:
    """One phase of an audited loop.

    Attributes:
        num_steps: Its length.
        before: What happens before a step's forward.
        stepped: What happens between a step and the look after it.
        between: What happens after that look, before a checkpoint is written.
        idle: Patterns of what may stay as it is.
        attached: Whether hooks look.
        rate: Of the only optimizer, which holds all that trains, and the trunk's first layer if `decayed`.
        steps: Whether the optimizer steps.
        every: If given, how often the audit looks, said at the phase's true begin only.
    """

    num_steps: int
    before: Act = nothing
    stepped: Act = nothing
    between: Act = nothing
    idle: Sequence[str] = ("unused",)
    attached: bool = False
    rate: float = 0.1
    decayed: bool = False
    steps: bool = True
    every: int = 0

    def build(self) -> None:
        self.net = Net()
        self.average = copy.deepcopy(self.net)
        held = [*self.net.head.parameters(), *self.net.late.parameters(), *self.net.unused.parameters()]
        held += [*self.net.trunk[0].parameters()] if self.decayed else []
        self.optimizer: Optimizer = SGD(held, lr=self.rate, weight_decay=0.1 * self.decayed)
        self.audit = GradientAudit(self.net, ["trunk"], policy="collect", ema=self.average)

    def begin(self) -> None:
        if self.attached:
            self.audit.attach(self.optimizer)
        self.audit.begin("only", optimizers=[self.optimizer], idle=self.idle)

    def report(self, stop: int | None) -> dict[str, Any]:
        """The report's content, stopped after a step, or not at all."""
        self.build()
        self.begin()
        if self.every:
            self.audit.look_every(self.every)
        for step in range(1, self.num_steps + 1):
            self.step(step)
            if step == stop:
                self.audit.verify(counted=False)
                state = json.loads(json.dumps(self.audit.state_dict()))
                tensors = [copy.deepcopy(each.state_dict()) for each in (self.net, self.average, self.optimizer)]
                late_weight = self.net.late_weight
                self.build()
                for each, saved in zip((self.net, self.average, self.optimizer), tensors, strict=True):
                    each.load_state_dict(saved)
                self.net.late_weight = late_weight
                self.audit.load_state_dict(state)
                self.begin()
        self.audit.end()
        return self.audit.report.to_json()

    def step(self, step: int) -> None:
        self.before(self, step)
        (self.net(X) - 1).square().mean().backward()
        if not self.attached:
            self.audit.after_backward()
        if self.steps:
            self.optimizer.step()
        self.stepped(self, step)
        if not self.attached:
            self.audit.after_step()
        self.optimizer.zero_grad()
        self.between(self, step)


def late_signal(loop: Loop, step: int) -> None:
    loop.net.late_weight = float(step > 4)


def no_rate_later(loop: Loop, step: int) -> None:
    loop.optimizer.param_groups[0]["lr"] = 0.1 if step < 3 else 0.0


def written_back(loop: Loop, _: int) -> None:
    with torch.no_grad():
        for head, first in ((loop.net.head, Net().head), (loop.net.late, Net().late)):
            head.weight.copy_(first.weight)
            head.bias.copy_(first.bias)


def same_bits(loop: Loop, step: int) -> None:
    if step == 3:
        with torch.no_grad():
            loop.net.trunk[2].weight.mul_(1)  # type: ignore[operator]


def elsewhere(loop: Loop, step: int) -> None:
    if step == 3:
        loop.net.trunk[2].weight.data = loop.net.trunk[2].weight.data.clone()  # type: ignore[union-attr]


def trunk_then_its_average(loop: Loop, step: int) -> None:
    with torch.no_grad():
        if step == 2:
            loop.net.trunk[2].weight.add_(1)  # type: ignore[operator]
        # In the last step: a look before a checkpoint would find it earlier than the turns do.
        if step == 6:
            loop.average.trunk[2].weight.add_(1)  # type: ignore[operator]


def gradient_early_and_a_write_late(loop: Loop, step: int) -> None:
    weight = loop.net.trunk[0].weight
    assert isinstance(weight, Tensor)
    if step == 5:
        with torch.no_grad():
            weight.add_(1)


def gradient_of_zero(loop: Loop, step: int) -> None:
    weight = loop.net.trunk[0].weight
    assert isinstance(weight, Tensor)
    # It is there for the look after the backward of one step, and moves nothing.
    if step == 2:
        weight.grad = torch.zeros_like(weight)
    elif step == 3:
        weight.grad = None


LOOPS = {
    "when the last parameter had its first gradient": Loop(12, before=late_signal, idle=()),
    "backwards of a loop that never steps": Loop(FEW, attached=True, steps=False),
    "a rate that was not always 0": Loop(7, before=no_rate_later, stepped=written_back),
    "the first fingerprint of what changed": Loop(6, stepped=trunk_then_its_average),
    "that there was a gradient": Loop(
        6, before=gradient_of_zero, stepped=gradient_early_and_a_write_late, decayed=True, rate=0.0
    ),
    "how often it looks": Loop(14, every=5),
    "a sign of a write that was not followed up": Loop(6, between=same_bits),
    "a sign of a move that was not followed up": Loop(6, between=elsewhere),
}


@pytest.mark.parametrize("bytes_a_step", [8, 20, 2**18])
@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_nothing_that_the_report_depends_on_is_lost_at_a_stop(
    loop: Loop, bytes_a_step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mtl.audit.watch.readings.BYTES_A_STEP", bytes_a_step)
    expected = loop.report(None)
    for stop in range(1, loop.num_steps):
        assert loop.report(stop) == expected, stop


def test_a_parameter_that_was_replaced_before_the_stop_is_counted_as_it_was() -> None:
    for first_steps, num_trained in ((0, 3), (1, 4)):
        for is_stopped in (False, True):
            loop = Loop(4)
            loop.build()
            loop.begin()
            for step in range(first_steps):
                loop.step(step)
            loop.net.late.weight = nn.Parameter(torch.ones(1, 2))
            loop.step(first_steps)
            if is_stopped:
                state, tensors = loop.audit.state_dict(), loop.net.state_dict()
                loop.build()
                loop.net.load_state_dict(tensors)
                loop.audit.load_state_dict(state)
                loop.begin()
            for step in range(3):
                loop.step(step)
            loop.audit.end()
            [record] = loop.audit.report.phases
            assert record.num_trained == num_trained, (first_steps, is_stopped)
            assert {(v.kind, v.name) for v in record.violations} == {("not_in_optimizer", "late.weight")}
