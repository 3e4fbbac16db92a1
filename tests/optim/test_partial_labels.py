"""A step of whose tasks some have no label: its gradient is that of the labelled part, for every balancing method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.amp import GradScaler

from mtl.config import SettingError
from mtl.config.optim import BalanceConfig
from mtl.distributed.world import ALONE
from mtl.optim.balance.balance import Balance
from mtl.optim.balance.build import build_balance, is_by_gradients, scalarizers
from mtl.optim.balance.gradient_balance import Shared, StepGradients
from mtl.optim.balance.gradient_method import TaskGradients
from mtl.optim.balance.gradient_methods import method_names
from mtl.optim.balance.gradient_weights import GradientWeighting
from mtl.optim.balance.subset import Subset, others_unmoved

NUM = 4
TASKS = ("a", "b", "c", "d")
WEIGHTS = [0.5, 1.5, 2.0, 0.25]
# What a method needs; a list has an entry for each task.
OPTIONS: dict[str, dict[str, Any]] = {
    "cosmos": {"lambda_": 0.5, "weights": WEIGHTS},
    "pbi": {"theta": 2.0, "weights": WEIGHTS, "reference": [0.1, 0.0, 0.2, 0.1]},
    "stch": {"mu": 0.1, "weights": WEIGHTS, "reference": [0.1, 0.0, 0.2, 0.1]},
    "famo": {"min_losses": [0.01, 0.02, 0.03, 0.04]},
    "cagrad": {"c": 0.5},
    "fairgrad": {"alpha": 1.0},
    "krum": {"n_byzantine": 0},
    "upgrad": {"pref_vector": WEIGHTS},
    "dualproj": {"pref_vector": WEIGHTS},
    "alignedmtl": {"pref_vector": WEIGHTS},
    "pcd": {"tau": [0.1, 0.2, 0.3]},
    "config": {"pref_vector": WEIGHTS},
    "graddrop": {"leak": WEIGHTS},
    "trimmedmean": {"trim_number": 1},
}
METHODS = sorted({"fixed", *scalarizers(), *method_names()})
SUBSETS = [(0,), (1, 3), (0, 2), (0, 1, 3), (1, 2, 3)]


def balance_of(method: str, places: Sequence[int]) -> Balance:
    """The method over some of the tasks, with the options that belong to these."""
    names = [TASKS[place] for place in places]
    if method == "fixed":
        config = BalanceConfig(method="fixed", weights={TASKS[place]: WEIGHTS[place] for place in places})
        return build_balance(config, names, names)
    own = dict(OPTIONS.get(method, {}))
    for name, value in own.items():
        if name == "tau":
            own[name] = [value[place - 1] for place in places if place]
        elif isinstance(value, list):
            own[name] = [value[place] for place in places]
    return build_balance(BalanceConfig(method=method, options=own), names)


class Model(nn.Module):
    """A shared layer and a head a task, in float64."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.shared = nn.Linear(5, 6, dtype=torch.float64)
        self.heads = nn.ModuleList(nn.Linear(6, 1, dtype=torch.float64) for _ in range(NUM))

    def sample_losses(self, x: Tensor, y: Tensor, place: int) -> Tensor:
        """The loss of each sample in a task, "b"; positive."""
        return (self.heads[place](self.shared(x).tanh())[:, 0] - y[:, place]) ** 2 + 0.05

    def gradients(self) -> list[Tensor | None]:
        found = [None if p.grad is None else p.grad.clone() for p in self.parameters()]
        self.zero_grad()
        return found


def step(model: Model, balance: Balance, losses: Sequence[Tensor], subset: Subset | None) -> list[Tensor | None]:
    """The gradients of all parameters, and of the method's own."""
    torch.manual_seed(7)
    if balance.by_gradients is None:
        balance(torch.stack(list(losses)), subset).backward()
    else:
        what = Shared(parameters=list(model.shared.parameters()), others=list(model.heads.parameters()))
        values, gradients = torch.stack(list(losses)).detach(), StepGradients(ALONE, GradScaler("cpu", enabled=False))
        gradients.add(losses, values, what)
        gradients.loss(values.sum(), balance.by_gradients, what, subset).backward()
    return model.gradients()


def labelled_means(model: Model, x: Tensor, y: Tensor, has: Tensor, places: Sequence[int]) -> list[Tensor]:
    """The mean of per-sample losses over the samples with a label, a scalar a task."""
    return [model.sample_losses(x, y, place)[has[:, place]].mean() for place in places]


@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
@settings(max_examples=6, deadline=None)
def test_a_step_is_that_of_the_method_over_the_labelled_tasks(method: str, data: st.DataObject) -> None:
    places = data.draw(st.sampled_from(SUBSETS))
    if method == "pcd" and 0 not in places:
        places = (0, *places)
    if method in ("krum", "trimmedmean") and len(places) < 3:
        places = (0, 1, 3)
    seed = data.draw(st.integers(0, 1000))
    model, generator = Model(seed), torch.Generator().manual_seed(seed)
    x = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    y = torch.randn(6, NUM, generator=generator, dtype=torch.float64)
    has = torch.rand(6, NUM, generator=generator) < 0.6
    # At least one label of each task of the step, and none of another's.
    has[0] = True
    has &= torch.tensor([place in places for place in range(NUM)])

    whole, alone = balance_of(method, range(NUM)).double(), balance_of(method, places).double()
    ours = step(model, whole, labelled_means(model, x, y, has, places), Subset(tuple(places), NUM))

    # The reference: per-sample gradients by autograd, averaged over the labelled samples of each task, and weighed by
    # the method made for these tasks alone.
    parameters = list(model.parameters())
    losses = labelled_means(model, x, y, has, places)
    if alone.by_gradients is None:
        leaves = [loss.detach().requires_grad_() for loss in losses]
        torch.manual_seed(7)
        alone(torch.stack(leaves)).backward()
        weights = [leaf.grad for leaf in leaves]
        head_weights = weights
    else:
        rows = torch.stack([flat(sample_mean(model, x, y, has, place), parameters[:2]) for place in places])
        torch.manual_seed(7)
        if isinstance(alone.by_gradients, GradientWeighting):
            shared, heads = alone.by_gradients(rows @ rows.T).double() @ rows, None
        else:
            values = torch.stack(losses).detach()
            combined = alone.by_gradients.combine(TaskGradients(rows, values))
            shared = combined.of(rows)
            heads = None if combined.head_weights is None else list(combined.head_weights)
        weights = [torch.ones(())] * len(places)
        head_weights = weights if heads is None else heads
    expected: list[Tensor | None] = [None] * len(parameters)
    for place, weight, head_weight in zip(places, weights, head_weights, strict=True):
        for at, gradient in enumerate(sample_mean(model, x, y, has, place)):
            if at < 2 or at in (2 + 2 * place, 3 + 2 * place):
                factor = weight if at < 2 else head_weight
                assert factor is not None
                before = expected[at]
                expected[at] = factor * gradient if before is None else before + factor * gradient
    if alone.by_gradients is not None:
        parts = shared.split([p.numel() for p in parameters[:2]])
        expected[:2] = [part.view_as(p) for part, p in zip(parts, parameters, strict=False)]
    for left, right in zip(ours, expected, strict=True):
        assert (left is None) == (right is None)
        if left is not None and right is not None:
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


def sample_mean(model: Model, x: Tensor, y: Tensor, has: Tensor, place: int) -> list[Tensor]:
    """The mean gradient of a task's loss over its labelled samples, each by a backward of its own."""
    parameters, found = list(model.parameters()), list[list[Tensor]]()
    for sample in has[:, place].nonzero().flatten().tolist():
        loss = model.sample_losses(x[[sample]], y[[sample]], place).sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        pairs = zip(parameters, gradients, strict=True)
        found.append([torch.zeros_like(p) if gradient is None else gradient for p, gradient in pairs])
    return [torch.stack(each).mean(0) for each in zip(*found, strict=True)]


def flat(gradients: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients[: len(parameters)]])


@pytest.mark.parametrize("method", ["dwa", "famo", "gradvac", "pcd", "uw", "imtll"])
def test_what_a_method_knows_of_a_task_without_labels_stays(method: str) -> None:
    """Some passes, in which a task has labels in every other step: its state is that of a run of these steps alone."""
    rows = torch.rand(24, NUM, generator=torch.Generator().manual_seed(0)) + 0.1
    balance, places = balance_of(method, range(NUM)), (0, 1, 3)
    only = balance_of(method, places)
    for number, row in enumerate(rows):
        subset = Subset(places, NUM)
        if isinstance(balance.by_gradients, GradientWeighting) and isinstance(only.by_gradients, GradientWeighting):
            generator = torch.Generator().manual_seed(number)
            gradients = torch.randn(len(places), 9, generator=generator) * row[[0, 1, 3], None]
            torch.manual_seed(number)
            ours = balance.by_gradients(gradients @ gradients.T, subset)
            torch.manual_seed(number)
            assert torch.equal(ours, only.by_gradients(gradients @ gradients.T))
            continue
        given = row[list(places)]
        ours, theirs = balance(given, subset), only(given)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
        if balance.follows_steps:
            balance.after_step(given * 0.9, subset)
            only.after_step(given * 0.9)
        if number % 6 == 5:
            balance.after_epoch()
            only.after_epoch()
    for name, parameter in balance.named_parameters():
        assert parameter[2] == 0
        torch.testing.assert_close(parameter[[0, 1, 3]], only.get_parameter(name))


def test_an_average_of_dwa_is_that_over_the_steps_with_labels() -> None:
    balance = balance_of("dwa", range(NUM))
    losses = torch.tensor([[1.0, 2.0, 3.0, 4.0], [3.0, 4.0, 5.0, 6.0]])
    for _ in range(2):
        balance(losses[0])
        balance(losses[1][[0, 1]], Subset((0, 1), NUM))
        balance.after_epoch()
        losses = losses / torch.tensor([1.0, 2.0, 3.0, 4.0])
    older, newer = torch.tensor([2.0, 3.0, 3.0, 4.0]), torch.tensor([2.0, 1.5, 1.0, 1.0])
    expected = (4 * torch.softmax(newer / older / 2, dim=0)).sum()
    torch.testing.assert_close(balance(torch.ones(4)), expected)


def test_a_task_of_dwa_without_labels_in_a_pass_has_a_rate_of_1() -> None:
    balance, few = balance_of("dwa", range(NUM)), Subset((0, 1), NUM)
    for losses, subset in (([2.0, 2], few), ([1.0, 2, 3, 4], None)):
        balance(torch.tensor(losses), subset)
        balance.after_epoch()
    expected = 4 * torch.softmax(torch.tensor([0.5, 1, 1, 1]) / 2, dim=0)
    given = torch.tensor([1.0, 10, 100, 1000])
    torch.testing.assert_close(balance(given), (expected * given).sum())
    balance.after_epoch()
    balance(torch.tensor([2.0, 2]), few)
    balance.after_epoch()
    assert balance.state()["_previous_averages"][1].tolist() == [2, 2, 100, 1000]


def test_a_state_with_a_count_a_task_is_restored() -> None:
    balance, other = balance_of("dwa", range(NUM)), balance_of("dwa", range(NUM))
    balance(torch.ones(2), Subset((0, 2), NUM))
    other.load_state(balance.state(), torch.device("cpu"))
    for each in (balance, other):
        each(torch.full((NUM,), 3.0))
        each.after_epoch()
    assert torch.equal(balance.state()["_previous_averages"][0], other.state()["_previous_averages"][0])
    torch.testing.assert_close(other.state()["_previous_averages"][0], torch.tensor([2.0, 3.0, 2.0, 3.0]))


def test_a_method_that_cannot_weigh_so_few_tasks_says_so() -> None:
    balance = build_balance(BalanceConfig(method="krum", options={"n_byzantine": 1}), TASKS)
    assert isinstance(balance.by_gradients, GradientWeighting)
    gradients = TaskGradients(torch.eye(2), torch.ones(2), subset=Subset((0, 1), NUM))
    with pytest.raises(SettingError, match="Krum cannot combine the 2 of 4 tasks that have a gradient in a step"):
        balance.by_gradients.combine(gradients)


@pytest.mark.parametrize("places", [(1,), (1, 2)])
def test_pcd_moves_nothing_shared_without_its_first_task(places: tuple[int, ...]) -> None:
    balance = balance_of("pcd", range(NUM))
    assert isinstance(balance.by_gradients, GradientWeighting)
    assert balance.by_gradients(torch.eye(len(places)), Subset(places, NUM)).tolist() == [0] * len(places)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("method", ["uw", "imtll"])
def test_a_step_of_the_optimizer_leaves_the_scales_of_other_tasks(method: str, kind: Any) -> None:
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    balance = balance_of(method, range(NUM))
    optimizer, subset = kind(balance.parameters(), lr=0.1, weight_decay=0.1, **options), Subset((0, 3), NUM)
    (scales,) = balance.parameters()
    for _ in range(3):
        balance(torch.full((NUM,), 3.0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    before = scales.detach().clone()
    moments = {name: value.clone() for name, value in optimizer.state[scales].items() if value.ndim}
    balance(torch.full((2,), 5.0), subset).backward()
    with others_unmoved([scales], lambda: optimizer, subset):
        optimizer.step()
    assert torch.equal(scales[[1, 2]], before[[1, 2]]) and (scales[[0, 3]] != before[[0, 3]]).all()
    assert moments and all(torch.equal(optimizer.state[scales][name][[1, 2]], v[[1, 2]]) for name, v in moments.items())


def test_all_methods_are_known_to_this_file() -> None:
    by_gradients = {*method_names()} - scalarizers().keys()
    assert all(is_by_gradients(method) for method in by_gradients) and by_gradients <= set(METHODS)
