"""Balancing: every scalarizer of TorchJD by name, what they learn, and fixed weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torchjd import scalarization

from mtl.config import SettingError
from mtl.config.optim import BalanceConfig
from mtl.optim.balance.build import build_balance, scalarizers

TASKS = ["a", "b", "c"]
LOSSES = torch.tensor([1.0, 2.0, 4.0])
OPTIONS: dict[str, dict[str, Any]] = {
    "cosmos": {"lambda_": 0.5, "weights": [0.2, 0.3, 0.5]},
    "pbi": {"theta": 1.0, "weights": [0.2, 0.3, 0.5]},
    "stch": {"mu": 0.1},
}


def test_every_scalarizer_of_torchjd_has_a_name() -> None:
    theirs = {name.lower() for name in scalarization.__all__} - {"scalarizer", "constant"}
    assert scalarizers().keys() == theirs | {"si"}


def test_the_sum_of_logarithms_does_not_see_the_scale_of_a_loss() -> None:
    balance = build_balance(BalanceConfig(method="si"), TASKS)
    found = list[Tensor]()
    for scale in (1.0, 1000.0):
        leaf = torch.tensor([0.5, 2.0, 4.0], requires_grad=True)
        total = balance(leaf * torch.tensor([1.0, scale, 1.0]))
        assert total.item() == pytest.approx(math.log(0.5 * 2 * 4 * scale), rel=1e-6)
        total.backward()
        assert leaf.grad is not None
        found.append(leaf.grad)
    # 1 / loss, whatever the scale; `geometricmean` has the same direction.
    torch.testing.assert_close(found[0], torch.tensor([2.0, 0.5, 0.25]))
    torch.testing.assert_close(found[1], found[0])
    leaf = torch.tensor([0.5, 2.0, 4.0], requires_grad=True)
    build_balance(BalanceConfig(method="geometricmean"), TASKS)(leaf).backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad / leaf.grad.norm(), found[0] / found[0].norm())


@pytest.mark.parametrize("method", sorted(scalarizers()))
def test_every_scalarizer_gives_a_loss_with_gradient(method: str) -> None:
    balance = build_balance(BalanceConfig(method=method, options=OPTIONS.get(method, {})), TASKS)
    losses = LOSSES.clone().requires_grad_()
    total = balance(losses)
    total.backward()
    assert total.ndim == 0 and losses.grad is not None and losses.grad.abs().sum() > 0
    if balance.follows_steps:
        balance.after_step(0.9 * LOSSES)
    balance.after_epoch()


def test_fixed_weights_weigh_the_losses_in_the_order_of_the_tasks() -> None:
    balance = build_balance(BalanceConfig(method="fixed", weights={"b": 10.0, "a": 1.0, "c": 100.0}), TASKS)
    assert balance(LOSSES).item() == 1 * 1 + 10 * 2 + 100 * 4
    assert "scalarizer.weights" in balance.state_dict(), "the weights follow the module to a device"


def test_uncertainty_weighting_is_the_formula_of_the_paper_and_learns() -> None:
    balance = build_balance(BalanceConfig(method="uw"), TASKS)
    (name, parameter), *others = balance.named_parameters()
    assert name == "scalarizer.log_var" and not others
    with torch.no_grad():
        parameter.copy_(torch.tensor([0.0, 1.0, -1.0]))
    expected = sum(0.5 * torch.exp(-s) * loss + 0.5 * s for s, loss in zip(parameter, LOSSES, strict=True))
    torch.testing.assert_close(balance(LOSSES), expected)
    assert balance.param_groups == []


def test_famo_steps_its_own_weights_towards_the_loss_that_fell_least() -> None:
    balance = build_balance(BalanceConfig(method="famo"), TASKS)
    (weights,) = balance.parameters()
    assert [id(p) for group in balance.param_groups for p in group["params"]] == [id(weights)]
    for _ in range(5):
        balance(LOSSES)
        balance.after_step(LOSSES * torch.tensor([1.0, 0.5, 0.9]))
    assert weights.argmax() == 0 and weights.argmin() == 1


def test_dwa_weighs_by_the_course_over_epochs() -> None:
    balance = build_balance(BalanceConfig(method="dwa"), TASKS)
    for factor in (torch.ones(3), torch.tensor([1.0, 0.5, 0.5])):
        balance(LOSSES * factor)
        balance.after_epoch()
    losses = LOSSES.clone().requires_grad_()
    balance(losses).backward()
    assert losses.grad is not None and losses.grad[0] > losses.grad[1], "the task that did not improve weighs more"


@pytest.mark.parametrize(
    "config, message",
    [
        (BalanceConfig(method="uv"), r"balance\.method: no method 'uv'; nearest: uw; there are: fixed, cosmos, "),
        (BalanceConfig(method="fixed", weights={"a": 1.0}), r"balance\.weights: expected a weight for each of a, b, c"),
        (BalanceConfig(method="dwa", options={"t": 1}), r"balance\.options: dwa takes the options temperature: "),
        (BalanceConfig(method="dwa", options={"temperature": -1.0}), "should be strictly positive"),
        (BalanceConfig(method="cosmos"), r"cosmos takes the options lambda_, weights: "),
    ],
)
def test_mistakes_are_named_with_the_choices(config: BalanceConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_balance(config, TASKS)


def test_a_pass_that_a_phase_broke_off_is_no_part_of_the_next_one() -> None:
    broken, whole = (build_balance(BalanceConfig(method="dwa"), ["a", "b"]) for _ in range(2))
    broken(torch.tensor([9.0, 1.0]))
    broken.after_phase()
    for balance in (broken, whole):
        for losses in ([4.0, 2.0], [2.0, 2.0], [1.0, 2.0]):
            balance(torch.tensor(losses))
            balance.after_epoch()
    assert torch.equal(broken(torch.tensor([1.0, 1.0])), whole(torch.tensor([1.0, 1.0])))


def test_losses_for_which_a_method_of_torchjd_is_not_defined_are_the_users_mistake() -> None:
    balance = build_balance(BalanceConfig(method="geometricmean"), ["a", "b"])
    with pytest.raises(SettingError, match=r"balance\.method: GeometricMean is only defined for non-negative values"):
        balance(torch.tensor([1.0, -1.0]))
