"""Balanced gradients: those of TorchJD's own backward, what fp16 needs, and what a step leaves."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torchjd import aggregation
from torchjd.autojac import jac_to_grad, mtl_backward

from mtl.distributed.world import ALONE
from mtl.optim.balance.gradient_balance import Shared, StepGradients
from mtl.optim.balance.gradient_method import Combined, GradientMethod, TaskGradients
from mtl.optim.balance.gradient_weights import gradient_methods, make_weighting
from mtl.optim.task_gradients import inner_products

OFF = GradScaler("cpu", enabled=False)
METHODS = ["mgda", "pcgrad", "alignedmtl", "gradvac", "pcd"]
METHODS += ["upgrad", "dualproj"] if find_spec("quadprog") else []


class By(GradientMethod):
    """Gradients combined by weights that follow from their Gramian."""

    def __init__(self, weigh: Callable[[Tensor], Tensor]) -> None:
        self._weigh = weigh

    def combine(self, gradients: TaskGradients) -> Combined:
        return self._combine(gradients)

    def _combine(self, gradients: TaskGradients) -> Combined:
        return Combined(weights=self._weigh(inner_products(gradients.rows)))


def balanced(
    value: Tensor,
    losses: list[Tensor],
    shared: list[nn.Parameter],
    others: list[nn.Parameter],
    weigh: Callable[[Tensor], Tensor],
    scaler: GradScaler,
) -> Tensor:
    """The loss of a step of one batch."""
    step, what = StepGradients(ALONE, scaler), Shared(parameters=shared, others=others)
    step.add(losses, torch.stack(losses).detach(), what)
    return step.loss(value, By(weigh), what)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh()).double()
        self.heads = nn.ModuleList(nn.Linear(6, 2).double() for _ in range(3))
        # One that no task reaches.
        self.idle = nn.Linear(2, 2).double()

    def losses(self) -> tuple[Tensor, list[Tensor]]:
        torch.manual_seed(1)
        features = self.trunk(torch.randn(16, 5, dtype=torch.float64))
        targets = torch.randn(3, 16, 2, dtype=torch.float64)
        return features, [(head(features) - y).square().mean() for head, y in zip(self.heads, targets, strict=True)]

    def total(self, weigh: Any, scaler: GradScaler = OFF) -> Tensor:
        losses = self.losses()[1]
        shared = [*self.trunk.parameters(), *self.idle.parameters()]
        value = torch.stack(losses).sum()
        return balanced(value, losses, shared, list(self.heads.parameters()), weigh, scaler)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("method", METHODS)
def test_trunk_and_heads_get_the_gradients_of_torchjds_own_backward(method: str) -> None:
    model, reference = Small(), Small()
    features, losses = reference.losses()
    mtl_backward(losses, features=features)
    torch.manual_seed(2)
    jac_to_grad(reference.trunk.parameters(), getattr(aggregation, gradient_methods()[method])())
    weighting = make_weighting(method, {})

    def weigh(gramian: Tensor) -> Tensor:
        torch.manual_seed(2)
        return weighting(gramian)

    total = model.total(weigh)
    total.backward()
    assert total.item() == pytest.approx(sum(loss.item() for loss in losses))
    for (name, expected), got in zip(gradients(reference).items(), gradients(model).values(), strict=True):
        assert (got is None) == (expected is None) == name.startswith("idle"), name
        # The weights are made in float32.
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7, msg=name)


def test_the_gramian_is_that_of_the_gradients_by_hand() -> None:
    model, seen = Small(), []

    def weigh(gramian: Tensor) -> Tensor:
        seen.append(gramian)
        return torch.tensor([2.0, 0.0, -1.0])

    model.total(weigh).backward()
    reference, rows = Small(), []
    for loss in reference.losses()[1]:
        rows.append(
            torch.cat(
                [
                    g.reshape(-1)
                    for g in torch.autograd.grad(loss, list(reference.trunk.parameters()), retain_graph=True)
                ]
            )
        )
    jacobian = torch.stack(rows)
    assert seen[0].dtype == torch.float64
    torch.testing.assert_close(seen[0], jacobian @ jacobian.T)
    got = torch.cat([p.grad.reshape(-1) for p in model.trunk.parameters() if p.grad is not None])
    torch.testing.assert_close(got, 2 * jacobian[0] - jacobian[2])


def test_heads_follow_their_own_loss_whatever_the_weights() -> None:
    model, plain = Small(), Small()
    model.total(lambda _: torch.tensor([0.0, -1.0, 5.0])).backward()
    torch.stack(plain.losses()[1]).sum().backward()
    for got, expected in zip(model.heads.parameters(), plain.heads.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad)


def test_a_step_keeps_no_gradient_and_no_graph_once_it_was_called_back() -> None:
    model = Small()
    total = model.total(lambda _: torch.ones(3))
    assert total.grad_fn is not None
    held = [weakref.ref(each) for each in total.grad_fn.gradients]  # type: ignore[attr-defined]
    total.backward()
    model.zero_grad(set_to_none=True)
    gc.collect()
    assert [each() for each in held] == [None] * len(held)


# fp16


def through_half(scaler: GradScaler, size: float) -> tuple[list[nn.Parameter], Tensor, list[Tensor]]:
    """Two losses whose gradients, of a size, pass through fp16."""
    shared = [nn.Parameter(torch.ones(2))]
    seen: list[Tensor] = []
    losses = [(shared[0].half().float() * size * torch.tensor(sign)).sum() for sign in ([1.0, 1.0], [-1.0, 2.0])]

    def weigh(gramian: Tensor) -> Tensor:
        seen.append(gramian)
        return make_weighting("mgda", {})(gramian)

    return shared, balanced(torch.tensor(1.0), losses, shared, [], weigh, scaler), seen


def test_gradients_that_fp16_cannot_hold_are_balanced_when_they_are_scaled() -> None:
    scaler = GradScaler("cpu", init_scale=2.0**16)
    shared, total, (gramian,) = through_half(scaler, 1e-8)
    expected = torch.tensor([[2e-16, 1e-16], [1e-16, 5e-16]], dtype=torch.float64)
    torch.testing.assert_close(gramian, expected, rtol=1e-2, atol=0.0)  # the scale is not in it
    scaler.scale(total).backward()
    assert shared[0].grad is not None and shared[0].grad.abs().min() > 0
    _, _, (vanished,) = through_half(OFF, 1e-8)
    assert vanished.abs().max() == 0


def test_gradients_that_overflow_are_left_to_the_scaler() -> None:
    scaler = GradScaler("cpu", init_scale=2.0**16)
    shared, total, (gramian,) = through_half(scaler, 1e3)
    assert not gramian.isfinite().all() and total.isfinite()
    optimizer = torch.optim.SGD(shared, lr=1.0)
    scaler.scale(total).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(shared[0], torch.ones(2)), "the step is left out"
    assert scaler.get_scale() == 2.0**15
