"""Small models and loops in which the audit is tried; freezing is done by hand, as in a stranger's loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from mtl.audit import GradientAudit, Report, Violation


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
    """One phase under the policy `collect`, with an optimizer of exactly what is trained."""
    optimizer = SGD(trainable(model), lr=0.1)
    audit = GradientAudit(model, freeze, [optimizer], policy="collect")
    with audit.phase("frozen"):
        train(audit, model, [optimizer], num_steps, **faults)
    return audit.report


def found(report: Report) -> list[tuple[str, str, str, int]]:
    return [(v.kind, v.name, v.phase, v.step) for v in report.violations]


def hazards(report: Report) -> list[tuple[str, str, str, int]]:
    return [(each.kind, each.name, each.phase, each.step) for each in report.hazards]


def only(report: Report) -> Violation:
    assert len(report.violations) == 1, report.violations
    assert not report.ok
    return report.violations[0]


class Normed(nn.Module):
    """trunk = Linear, BatchNorm, Dropout; head = Dropout, Linear, BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(2, 4, bias=False), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(4, 2, bias=False), nn.BatchNorm1d(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))


def write_smallest_bit(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.view(torch.int32)[0, 0] ^= 1


def write_numpy_alias(weight: nn.Parameter) -> None:
    weight.detach().numpy()[...] += 1


def write_in_place(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.mul_(2)


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
