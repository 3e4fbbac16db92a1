"""Methods of our own that look at gradients: closed forms, references in float64, memory, presets, where they look."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchjd.aggregation import CRMOGMWeighting, ExcessMTL, MGDAWeighting, MoDoWeighting, SDMGradWeighting

from mtl.checkpoint.nested import merge, split
from mtl.config import SettingError
from mtl.config.optim import BalanceConfig
from mtl.optim.balance.build import build_balance
from mtl.optim.balance.crmogm import CrMogm
from mtl.optim.balance.describe import options_in_use, settings_in_use
from mtl.optim.balance.gradient_method import Combined, GradientMethod, TaskGradients
from mtl.optim.balance.gradient_methods import build_gradient_method, method_names
from mtl.optim.balance.nashmtl import nash_weights
from mtl.optim.balance.presets import PRESETS
from mtl.optim.balance.subset import Subset

TASKS = ["a", "b", "c"]
OPTIONS: dict[str, dict[str, Any]] = {
    "cagrad": {"c": 0.5},
    "fairgrad": {"alpha": 1.0},
    "krum": {"n_byzantine": 0},
    "trimmedmean": {"trim_number": 1},
    "gradnorm": {"warmup_steps": 2},
    "probe-then-fix": {"probe_steps": 2},
    "excessmtl": {"n_warmup_steps": 1},
    "nashmtl": {"update_weights_every": 2},
    "crmogm": {"method": "mgda"},
    # So few and short inner steps that the last weights are seen in the next.
    "sdmgrad": {"lr": 0.1, "n_iter": 2},
}
# Those with state from step to step.
STATEFUL = ["crmogm", "dbmtl", "excessmtl", "gradnorm", "gradvac", "moco", "modo", "nashmtl", "pcd", "probe-then-fix"]
STATEFUL += ["sdmgrad"]


def build(method: str, num_tasks: int = 3, **options: Any) -> GradientMethod:
    return build_gradient_method(method, OPTIONS.get(method, {}) | options, num_tasks)


def steps(num: int, num_tasks: int = 3, width: int = 6, places: Sequence[int] = ()) -> list[TaskGradients]:
    """Gradients of some steps, each of three batches, whose gradients are alike."""
    found = []
    for seed in range(num):
        generator = torch.Generator().manual_seed(seed)
        base, *noise = (torch.randn(num_tasks, width, generator=generator, dtype=torch.float64) for _ in range(4))
        batches = tuple(base + 0.3 * each for each in noise)
        losses = torch.rand(num_tasks, generator=generator, dtype=torch.float64) + 0.5
        gradients = TaskGradients(torch.stack(batches).mean(0), losses, batches)
        found.append(gradients.of(list(places)) if places else gradients)
    return found


def weights_of(method: GradientMethod, gradients: TaskGradients) -> Tensor:
    combined = method.combine(gradients)
    assert combined.weights is not None
    return combined.weights.double()


# GradNorm


def test_gradnorm_follows_its_equations() -> None:
    """Equation 2 by autograd, torch's Adam, and the mean of the first losses."""
    method, given = build("gradnorm", alpha=1.5, lr=0.1), steps(12)
    v = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    adam, first = torch.optim.Adam([v], lr=0.1), torch.stack([each.losses for each in given[:2]]).mean(0)
    for number, gradients in enumerate(given):
        w = v.exp() * 3 / v.exp().sum()
        combined = method.combine(gradients)
        assert combined.weights is not None and combined.head_weights is not None
        torch.testing.assert_close(combined.weights.double(), w.detach(), rtol=1e-6, atol=0)
        assert torch.equal(combined.head_weights, combined.weights)
        if number < 2:
            assert combined.weights.tolist() == [1, 1, 1]
            continue
        norms = gradients.rows.norm(dim=1)
        rates = gradients.losses / first
        with torch.no_grad():
            target = (w * norms).mean() * (rates / rates.mean()) ** 1.5
        # The scale to a sum of T comes after the step: w itself is exp(v) times a constant.
        scale = 3 / v.detach().exp().sum()
        adam.zero_grad()
        (v.exp() * scale * norms - target).abs().sum().backward()
        adam.step()


def test_gradnorm_without_a_pull_of_the_rates_makes_all_gradients_equally_long() -> None:
    method, gradients = build("gradnorm", alpha=0.0, lr=0.01, warmup_steps=1), steps(1)[0]
    for _ in range(600):
        weights = weights_of(method, gradients)
    lengths = weights * gradients.rows.norm(dim=1)
    assert lengths.max() / lengths.min() < 1.05 and weights.sum().item() == pytest.approx(3)


# DB-MTL, MoCo


def test_dbmtl_follows_its_algorithm() -> None:
    method, mean = build("dbmtl", beta=0.8, sigma=0.5), torch.zeros(3, 6, dtype=torch.float64)
    for k, gradients in enumerate(steps(4), start=1):
        kept = 0.8 / k**0.5
        mean = kept * mean + (1 - kept) * gradients.rows / (gradients.losses + 1e-8)[:, None]
        norms = mean.norm(dim=1)
        combined = method.combine(gradients)
        torch.testing.assert_close(combined.of(gradients.rows), (norms.max() / (norms + 1e-8)) @ mean)
        torch.testing.assert_close(combined.head_weights, 1 / (gradients.losses + 1e-8))


def test_moco_follows_its_algorithm() -> None:
    method = build("moco", beta=0.7, beta_sigma=0.3, gamma=0.2, gamma_sigma=0.4, rho=0.1)
    mean, weights = torch.zeros(3, 6, dtype=torch.float64), torch.full((3,), 1 / 3, dtype=torch.float64)
    for k, gradients in enumerate(steps(4), start=1):
        scaled = gradients.rows / (gradients.rows.norm(dim=1) + 1e-8)[:, None] * gradients.losses[:, None]
        mean = mean - 0.7 / k**0.3 * (mean - scaled)
        products = mean @ mean.T + 0.1 * torch.eye(3)
        weights = torch.softmax(weights - 0.2 / k**0.4 * (products @ weights), dim=0)
        torch.testing.assert_close(method.combine(gradients).of(gradients.rows), weights @ mean)


# Nash-MTL


@given(seed=st.integers(0, 10_000), num=st.integers(2, 12))
@settings(max_examples=60, deadline=None)
def test_nash_weights_solve_the_bargaining_equation(seed: int, num: int) -> None:
    rows = torch.randn(num, num + 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    products = rows @ rows.T
    weights = nash_weights(products / products.norm())
    assert weights is not None and weights.min() > 0
    torch.testing.assert_close((products / products.norm()) @ weights * weights, torch.ones(num, dtype=torch.float64))


def test_nash_weights_of_two_tasks_have_a_closed_form() -> None:
    p, q, r = 4.0, -1.0, 9.0
    first = 1 / math.sqrt(p + q * math.sqrt(p / r))
    weights = nash_weights(torch.tensor([[p, q], [q, r]]))
    assert weights is not None and weights.tolist() == pytest.approx([first, first * math.sqrt(p / r)])


@pytest.mark.parametrize("exponent", range(-12, 13, 3))
@pytest.mark.parametrize("cosine", [-0.9, 0.0, 0.9])
def test_nash_weights_bring_gradients_of_any_two_sizes_to_one_length(exponent: int, cosine: float) -> None:
    """The closed form for two tasks: a_i |g_i| = 1 / sqrt(1 + cosine) for both."""
    sizes = torch.tensor([1.0, 10.0**exponent], dtype=torch.float64)
    rows = torch.tensor([[1.0, 0.0], [cosine, math.sqrt(1 - cosine**2)]], dtype=torch.float64) * sizes[:, None]
    weights = nash_weights(rows @ rows.T)
    assert weights is not None
    expected = torch.full((2,), 1 / math.sqrt(1 + cosine), dtype=torch.float64)
    torch.testing.assert_close(weights * sizes, expected, rtol=1e-9, atol=0)
    method = build("nashmtl", 2, max_norm=0.0)
    # The Gramian is divided by its norm, as in the authors' code.
    found = weights_of(method, TaskGradients(rows, torch.ones(2))) * sizes / (rows @ rows.T).norm().sqrt()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows", [[[1.0, 0.0], [-1.0, 0.0]], [[1.0, 0.0], [-2.0, 1e-9]]])
def test_where_gradients_cancel_nash_keeps_the_last_weights(rows: list[list[float]]) -> None:
    method = build("nashmtl", 2, update_weights_every=1, max_norm=0.0)
    before = weights_of(method, TaskGradients(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.ones(2)))
    assert torch.equal(weights_of(method, TaskGradients(torch.tensor(rows), torch.ones(2))), before)


def test_nash_bounds_the_gradient_and_solves_every_few_steps() -> None:
    method, given = build("nashmtl", max_norm=0.5), steps(4)
    found = [method.combine(gradients) for gradients in given]
    for combined, gradients in zip(found, given, strict=True):
        assert combined.of(gradients.rows).norm() <= 0.5 * (1 + 1e-6)
    kept = build("nashmtl", max_norm=0.0)
    free = [weights_of(kept, gradients) for gradients in given]
    assert torch.equal(free[0], free[1]) and torch.equal(free[2], free[3]) and not torch.equal(free[0], free[2])


# TorchJD's, where it has the same


def test_excessmtl_has_the_weights_of_torchjd() -> None:
    for warmup in (0, 2):
        ours, theirs = build("excessmtl", n_warmup_steps=warmup), ExcessMTL(1.0, warmup)
        for gradients in steps(6):
            expected = theirs.weighting(gradients.rows)  # type: ignore[arg-type]
            torch.testing.assert_close(weights_of(ours, gradients), expected, rtol=1e-5, atol=1e-7)


def test_crmogm_has_the_weights_of_torchjd() -> None:
    ours, theirs = build("crmogm", alpha=0.7), CRMOGMWeighting(MGDAWeighting(), 0.7)
    for gradients in steps(5):
        expected = theirs((gradients.rows @ gradients.rows.T).float())
        torch.testing.assert_close(weights_of(ours, gradients), expected.double(), rtol=1e-5, atol=1e-6)


def test_modo_and_sdmgrad_compare_independent_batches() -> None:
    modo, sdmgrad = MoDoWeighting(), SDMGradWeighting(lr=0.1, n_iter=2)
    ours, directed = build("modo"), build("sdmgrad")
    assert (ours.num_batches, directed.num_batches) == (2, 3)
    for gradients in steps(4):
        products: Any = (gradients.batches[0] @ gradients.batches[1].T).float()
        torch.testing.assert_close(weights_of(ours, gradients), modo(products).double())
        third = directed.combine(gradients).of(gradients.rows)
        torch.testing.assert_close(third, sdmgrad(products).double() @ gradients.batches[2])


def test_the_last_step_of_an_epoch_has_the_last_weights() -> None:
    method, given = build("modo"), steps(2)
    before = weights_of(method, given[0])
    alone = TaskGradients(given[1].rows, given[1].losses, given[1].batches[:1])
    torch.testing.assert_close(weights_of(method, alone), before)


# MGDA, CAGrad, probe-then-fix


@pytest.mark.parametrize("normalize", ["none", "l2", "loss", "loss+"])
@pytest.mark.parametrize("apply", ["raw", "normalized"])
def test_normalised_mgda_of_two_tasks_is_the_shortest_vector_between_the_divided(normalize: str, apply: str) -> None:
    rows, losses = torch.tensor([[3.0, 1.0], [-1.0, 0.5]], dtype=torch.float64), torch.tensor([2.0, 0.5])
    norms = rows.norm(dim=1)
    divisor = {"none": torch.ones(2), "l2": norms, "loss": losses, "loss+": losses * norms}[normalize].double()
    a, b = rows / divisor[:, None]
    # Sener and Koltun, arXiv 1810.04650, Algorithm 1.
    share = float(((b - a) @ b / ((a - b) @ (a - b))).clamp(0, 1))
    expected = torch.tensor([share, 1 - share], dtype=torch.float64) / (divisor if apply == "normalized" else 1)
    method = build("mgda", 2, normalize=normalize, apply=apply)
    torch.testing.assert_close(weights_of(method, TaskGradients(rows, losses)), expected, rtol=1e-5, atol=1e-6)


def test_cagrad_is_rescaled_as_its_authors_do() -> None:
    gradients = steps(1)[0]
    plain, scaled = (weights_of(build("cagrad", rescale=each), gradients) for each in (False, True))
    torch.testing.assert_close(scaled, plain / 1.25)


def test_a_probe_makes_the_mean_norms_equal_and_then_rests() -> None:
    method, given = build("probe-then-fix"), steps(5)
    found = [weights_of(method, gradients) for gradients in given]
    assert found[0].tolist() == found[1].tolist() == [1, 1, 1]
    norms = torch.stack([gradients.rows.norm(dim=1) for gradients in given[:2]]).mean(0)
    torch.testing.assert_close(found[2] * norms / (found[2] * norms)[0], torch.ones(3).double(), rtol=1e-5, atol=0)
    assert found[2].sum().item() == pytest.approx(3) and torch.equal(found[2], found[4])


# STCH of logarithms


def test_stch_of_logarithms_has_a_warm_up_a_nadir_and_a_maximum() -> None:
    options = {"warmup_epochs": 1, "mu": 0.5}
    balance = build_balance(BalanceConfig(method="stch", preset="libmtl", options=options), TASKS)
    losses = torch.rand(8, 3, generator=torch.Generator().manual_seed(0)) + 0.5
    for number in range(4):
        torch.testing.assert_close(balance(losses[number]), losses[number].log().sum())
        if number % 2:
            balance.after_epoch()
    nadir = losses[2:4].mean(0)
    for number in range(4, 8):
        expected = 3 * 0.5 * torch.logsumexp((losses[number] / nadir).log() / 0.5, dim=0)
        torch.testing.assert_close(balance(losses[number]), expected)
    few = Subset((0, 2), 3)
    expected = 2 * 0.5 * torch.logsumexp((losses[0] / nadir)[[0, 2]].log() / 0.5, dim=0)
    torch.testing.assert_close(balance(losses[0, [0, 2]], few), expected)


def test_an_unfinished_pass_of_the_nadir_does_not_count() -> None:
    balance = build_balance(BalanceConfig(method="stch", options={"log": True, "warmup_epochs": 0}), TASKS)
    balance(torch.tensor([5.0, 5.0, 5.0]))
    balance.after_phase()
    balance(torch.tensor([1.0, 2.0, 4.0]))
    balance.after_epoch()
    losses = torch.tensor([2.0, 2.0, 2.0])
    torch.testing.assert_close(balance(losses), 3 * torch.logsumexp((losses / torch.tensor([1.0, 2.0, 4.0])).log(), 0))


# Of every method


@pytest.mark.parametrize("method", method_names())
def test_gradients_that_are_not_finite_give_one_that_is_not_and_leave_no_state(method: str) -> None:
    built = build(method)
    before = json.dumps(split(built.state())[1], default=str)
    for place, value in ((0, math.inf), (1, math.nan)):
        gradients = steps(1)[0]
        gradients.rows[place, 2] = value
        assert not built.combine(gradients).of(gradients.rows).isfinite().any()
    assert json.dumps(split(built.state())[1], default=str) == before


@pytest.mark.parametrize("method", STATEFUL)
def test_a_method_that_is_saved_and_loaded_continues_to_the_same_bits(method: str) -> None:
    whole, first, second = build(method), build(method), build(method)
    given = steps(6)

    def run(built: GradientMethod, numbers: range) -> list[Tensor]:
        found = []
        for number in numbers:
            torch.manual_seed(number)
            found.append(built.combine(given[number]).of(given[number].rows))
        return found

    expected, got = run(whole, range(6)), run(first, range(3))
    tensors, rest = split(first.state())
    second.load_state(merge(tensors, json.loads(json.dumps(rest))))
    got += run(second, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    fresh = run(build(method), range(3, 6))
    assert not all(torch.equal(a, b) for a, b in zip(expected[3:], fresh, strict=True)), "what came before counts"


@pytest.mark.parametrize("method", method_names())
def test_a_task_that_has_no_gradient_leaves_the_step_and_what_a_method_knows_of_it_stays(method: str) -> None:
    """A task has none in any step: the others are balanced as if there was no such task."""
    whole, only = build(method, 4), build(method, 3)
    for number, gradients in enumerate(steps(5, num_tasks=4)):
        gradients.rows[2] = 0
        for rows in gradients.batches:
            rows[2] = 0
        alone = gradients.of([0, 1, 3])
        alone = TaskGradients(alone.rows, alone.losses, alone.batches)
        torch.manual_seed(number)
        ours = whole.combine(gradients).of(gradients.rows)
        torch.manual_seed(number)
        theirs = only.combine(alone).of(alone.rows)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7, msg=f"step {number}")


@pytest.mark.parametrize("method", method_names())
def test_a_zero_gradient_is_balanced_as_an_absent_one(method: str) -> None:
    zero, absent = build(method, 4), build(method, 4)
    for number, gradients in enumerate(steps(4, num_tasks=4)):
        given = gradients.of([1, 2, 3])
        gradients.rows[0] = 0
        for rows in gradients.batches:
            rows[0] = 0
        found = list[Tensor]()
        for built, each in ((zero, gradients), (absent, given)):
            torch.manual_seed(number)
            found.append(built.combine(each).of(each.rows))
        torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7, msg=f"step {number}")
    assert json.dumps(split(zero.state())[1]) == json.dumps(split(absent.state())[1])


@pytest.mark.parametrize("primary", [0.0, 1.0])
def test_pcd_moves_nothing_shared_where_its_first_task_has_no_gradient(primary: float) -> None:
    rows = torch.tensor([[primary, 0.0], [1.0, 1.0]])
    assert weights_of(build("pcd", 2), TaskGradients(rows, torch.ones(2))).any() == (primary > 0)


# What is known of the tasks, not of their gradients, stays.
@pytest.mark.parametrize(
    ("method", "options"),
    [("dbmtl", {}), ("moco", {}), ("mgda", {"normalize": "loss+"}), ("mgda", {"normalize": "loss"})],
)
def test_a_negative_loss_is_an_error_where_its_sign_would_turn_the_gradient(
    method: str, options: dict[str, Any]
) -> None:
    built = build_gradient_method(method, options, 3)
    gradients = TaskGradients(torch.eye(3), torch.tensor([1.0, -2.5, 0.5]))
    with pytest.raises(SettingError, match=r"needs losses of 0 or more, got -2\.5 of task 2 of 3"):
        built.combine(gradients)


STAYS = {"dbmtl": (), "moco": ("lambda",), "excessmtl": ("logs",), "crmogm": ("weights", "counts")}
REMEMBER_ROWS: dict[str, dict[str, Any]] = {"dbmtl": {"sigma": 0.5}, "moco": {}, "excessmtl": {"n_warmup_steps": 2}}
REMEMBER_ROWS |= {"crmogm": {"method": "excessmtl"}}


def test_all_methods_that_remember_rows_are_known_to_this_file() -> None:
    assert {method for method in method_names() if build(method).remembers_rows} == REMEMBER_ROWS.keys() - {"crmogm"}


@pytest.mark.parametrize("width", [6, 4])
@pytest.mark.parametrize("method", REMEMBER_ROWS)
def test_a_method_that_remembers_rows_begins_again_with_those_of_other_parameters(method: str, width: int) -> None:
    """Two blocks that take turns, as many entries in each or not: what was kept of one is not used for the other."""
    built, new = (build_gradient_method(method, REMEMBER_ROWS[method], 3) for _ in range(2))
    for gradients in steps(3, width=6):
        built.combine(replace(gradients, rows_of="block 1"))
    # The same knowledge of the tasks, and none of the gradients.
    kept = built.state()
    new.load_state(kept | {"memory": {name: kept["memory"][name] for name in STAYS[method]}})
    if isinstance(new, CrMogm):
        inner = kept["method"]["memory"]
        new._method.load_state({"memory": {name: inner[name] for name in STAYS["excessmtl"]}})
    for gradients in steps(3, width=width):
        ours = built.combine(replace(gradients, rows_of="block 2")).of(gradients.rows)
        assert torch.equal(ours, new.combine(gradients).of(gradients.rows))


def test_a_step_that_is_not_finite_does_not_change_what_is_remembered_of_rows() -> None:
    built, gradients = build("dbmtl"), replace(steps(1)[0], rows_of="block 1")
    built.combine(gradients)
    built.combine(replace(gradients, rows=gradients.rows * math.nan, rows_of="block 2"))
    assert built.state()["memory"]["rows_of"] == "block 1"


def test_a_memory_of_before_it_had_a_key_is_that_of_the_first_rows_it_is_used_for() -> None:
    whole, resumed, given = build("dbmtl"), build("dbmtl"), steps(3)
    for gradients in given[:2]:
        whole.combine(replace(gradients, rows_of="block 1"))
    old = whole.state()
    resumed.load_state({"memory": {name: value for name, value in old["memory"].items() if name != "rows_of"}})
    last = replace(given[2], rows_of="block 1")
    assert torch.equal(whole.combine(last).of(last.rows), resumed.combine(last).of(last.rows))
    assert resumed.state()["memory"]["rows_of"] == "block 1"


# What is refused, and presets


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "gradnorm", "options": {"alpha": -1}}, "gradnorm takes the options alpha, lr, .*: expected"),
        ({"method": "gradnorm", "options": {"alpha": "x"}}, "gradnorm takes .*: expected alpha: a number, got 'x'"),
        ({"method": "gradnorm", "options": {"alpha": math.nan}}, "balance.options: .*alpha: a finite number, got nan"),
        ({"method": "gradnorm", "options": {"lr": math.inf}}, "balance.options: .*lr: a finite number, got inf"),
        ({"method": "moco", "options": {"gamma": math.nan}}, "balance.options: .*gamma: a finite number, got nan"),
        ({"method": "nashmtl", "options": {"max_norm": math.nan}}, "balance.options: .*max_norm: a finite number"),
        ({"method": "mgda", "options": {"epsilon": math.nan}}, "balance.options: .*epsilon: a finite number, got nan"),
        ({"method": "modo", "options": {"gamma": math.inf}}, "balance.options: .*gamma: a finite number, got inf"),
        ({"method": "config", "options": {"pref_vector": [1.0, math.nan, 1.0]}}, "pref_vector: a finite number"),
        (
            {"method": "crmogm", "options": {"method": "cagrad", "options": {"c": math.nan}}},
            "balance.options: .* c: a finite number, got nan",
        ),
        ({"method": "stch", "options": {"mu": math.nan}}, "balance.options: .*mu: a finite number, got nan"),
        ({"method": "cosmos", "options": {"lambda_": math.nan, "weights": [1, 1, 1]}}, "lambda_: a finite number"),
        ({"method": "gradnorm", "options": {"warmup_steps": 2.5}}, "expected warmup_steps: a whole number, got 2.5"),
        ({"method": "dbmtl", "options": {"beta": True}}, "dbmtl takes .*: expected beta: a number, got True"),
        ({"method": "mgda", "options": {"normalize": 2}}, "mgda takes .*: expected normalize: text, got 2"),
        ({"method": "crmogm", "options": {"alpha": "much"}}, "crmogm takes .*: expected alpha: a number, got 'much'"),
        ({"method": "gradnorm", "options": {"rate": 1}}, "gradnorm takes the options alpha, lr, .*: got rate"),
        ({"method": "dbmtl", "options": {"beta": 1}}, "dbmtl takes the options beta, sigma: expected beta"),
        ({"method": "moco", "options": {"gamma": 0}}, "moco takes the options .*: expected beta above 0"),
        ({"method": "nashmtl", "options": {"update_weights_every": 0}}, "nashmtl takes .*: expected max_norm"),
        ({"method": "excessmtl", "options": {"robust_step_size": 0}}, "excessmtl takes .*: expected robust"),
        ({"method": "probe-then-fix", "options": {"probe_steps": 0}}, "probe-then-fix takes the options probe_steps: "),
        ({"method": "mgda", "options": {"normalize": "l1"}}, "mgda takes the options .*: expected normalize: none, l2"),
        ({"method": "crmogm", "options": {"method": "upgra"}}, "crmogm takes .*: there is no method .*upgrad"),
        ({"method": "crmogm", "options": {"method": "dbmtl"}}, "crmogm takes .*: DbMtl gives no weights"),
        ({"method": "cagrad", "options": {"c": 0.4, "rescale": 2}}, "cagrad takes .*: expected rescale: true or false"),
        ({"method": "stch", "options": {"mu": 1.0, "warmup_epochs": 3}}, "stch takes .*: warmup_epochs goes with log"),
        ({"method": "stch"}, "stch takes .*: expected mu"),
        ({"method": "uw", "preset": "paper"}, "balance.preset: uw has none; got paper"),
        ({"method": "cagrad", "preset": "samsung"}, "cagrad has the presets paper, libmtl, torchjd; got samsung"),
        ({"method": "uw", "on": "features"}, "balance.on: uw looks at no gradients; leave it out"),
        ({"method": "dbmtl", "on": "features"}, "balance.on: dbmtl makes a gradient of those of earlier steps, which"),
        ({"method": "moco", "on": "features", "per_sample": True}, "balance.on: moco makes a gradient of those of ear"),
        ({"method": "dbmtl", "on": {"layer": "trunk"}}, "balance.on: dbmtl makes a gradient of its own, .* layer al"),
        ({"method": "excessmtl", "on": "features", "per_sample": True}, "excessmtl remembers .* per_sample: false"),
        (
            {"method": "crmogm", "options": {"method": "excessmtl"}, "on": "features", "per_sample": True},
            "balance.on: crmogm remembers the entries of gradients, .* expected per_sample: false",
        ),
        ({"method": "modo", "on": "features"}, "balance.on: modo compares 2 batches of a step, of which features and"),
        ({"method": "sdmgrad", "on": {"layer": "trunk"}}, "balance.on: sdmgrad compares 3 batches of a step, of which"),
        ({"method": "graddrop", "on": "features"}, "balance.on: graddrop makes a gradient .* per_sample: true"),
        ({"method": "graddrop", "on": {"layer": "trunk"}}, "balance.on: graddrop makes a gradient of its own"),
    ],
)
def test_mistakes_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        build_balance(BalanceConfig(**settings), TASKS)


def test_a_preset_gives_the_options_that_are_not_given() -> None:
    gradients = steps(1)[0]
    preset = build_balance(BalanceConfig(method="cagrad", preset="paper", options={"c": 0.2}), TASKS).by_gradients
    assert preset is not None
    expected = weights_of(build("cagrad", c=0.2, rescale=True), gradients)
    assert torch.equal(weights_of(preset, gradients), expected)


@pytest.mark.parametrize(("method", "preset"), [(m, p) for m, presets in PRESETS.items() for p in presets])
def test_every_preset_can_be_built_and_is_shown_with_the_other_options(method: str, preset: str) -> None:
    options = {name: value for name, value in OPTIONS.get(method, {}).items() if name not in PRESETS[method][preset]}
    options |= {"mu": 1.0} if (method, preset) == ("stch", "torchjd") else {}
    config = BalanceConfig(method=method, preset=preset, options=options)  # type: ignore[arg-type]
    build_balance(config, TASKS)
    assert options_in_use(config).items() >= (PRESETS[method][preset] | options).items()


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({"method": "gradnorm", "options": {"alpha": 0.5}}, "alpha 0.5, lr 0.025, warmup_steps 50"),
        ({"method": "gradnorm", "preset": "samsung"}, "alpha 2, lr 0.025, warmup_steps 1, preset samsung"),
        ({"method": "crmogm"}, "method upgrad, options (norm_eps 0.0001, reg_eps 0.0001), alpha 0.9"),
        ({"method": "crmogm", "options": {"method": "imtlg"}}, "method imtlg, alpha 0.9"),
        ({"method": "famo"}, "lr 0.025, weight_decay 0.001"),
        ({"method": "cagrad", "options": {"c": 0.4}}, "c 0.4, norm_eps 1e-09, rescale false"),
        ({"method": "imtlg", "on": "features", "per_sample": True}, "on features, per_sample true"),
        ({"method": "imtlg", "on": {"layer": "trunk.layer4"}}, "on trunk.layer4"),
        ({"method": "fixed", "weights": {"a": 1, "b": 2}}, "weights (a 1, b 2)"),
        ({"method": "mean"}, ""),
    ],
)
def test_a_method_is_shown_with_the_options_that_it_has(settings: dict[str, Any], shown: str) -> None:
    assert settings_in_use(BalanceConfig(**settings)) == shown


def test_a_combined_gradient_is_either_given_or_weighed() -> None:
    rows = torch.eye(2)
    assert Combined(weights=torch.tensor([2.0, 3.0])).of(rows).tolist() == [2, 3]
    assert Combined(gradient=torch.ones(2)).of(rows).tolist() == [1, 1]
