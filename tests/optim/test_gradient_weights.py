"""Weights from a Gramian: which methods there are, closed forms, what is refused, what is kept, and odd Gramians."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchjd import aggregation
from torchjd.aggregation import GramianWeightedAggregator

from mtl.checkpoint.nested import merge, split
from mtl.config import SettingError
from mtl.config.optim import BalanceConfig
from mtl.optim.balance.build import build_balance, is_by_gradients
from mtl.optim.balance.gradient_method import TaskGradients
from mtl.optim.balance.gradient_methods import build_gradient_method, method_names
from mtl.optim.balance.gradient_weights import GradientWeighting, gradient_methods, make_weighting
from runs import tiny_config

TASKS = ["a", "b", "c"]
OPTIONS: dict[str, dict[str, Any]] = {"cagrad": {"c": 0.5}, "fairgrad": {"alpha": 1.0}, "krum": {"n_byzantine": 0}}
METHODS = sorted(gradient_methods())


def gramian(*rows: list[float]) -> Tensor:
    jacobian = torch.tensor(rows, dtype=torch.float64)
    return jacobian @ jacobian.T


CONFLICT = gramian([1.0, 0.0, 0.5], [-1.0, 2.0, 0.0], [0.0, -1.0, 1.0])


def weights_of(method: GradientWeighting, rows: Tensor) -> list[float]:
    weights = method.combine(TaskGradients(rows, torch.ones(len(rows)))).weights
    assert weights is not None
    return weights.tolist()


def build(method: str, **options: Any) -> GradientWeighting:
    built = build_gradient_method(method, OPTIONS.get(method, {}) | options, len(TASKS))
    assert isinstance(built, GradientWeighting)
    return built


# Which there are


def test_every_aggregator_of_torchjd_that_weighs_by_a_gramian_has_a_name() -> None:
    assert {"upgrad", "mgda", "pcgrad", "cagrad", "alignedmtl", "dualproj"} <= gradient_methods().keys()
    for name in gradient_methods().values():
        assert issubclass(getattr(aggregation, name), GramianWeightedAggregator)
    # And all others, with those that only have a weighting.
    names = {name.removesuffix("Weighting").lower() for name in aggregation.__all__}
    abstract = {"", "aggregator", "weightedaggregator", "gramianweightedaggregator"}
    scalarizers = {"mean", "sum", "random", "constant"}
    assert names - abstract - scalarizers <= {*method_names()}


@pytest.mark.parametrize("method", ["mean", "sum", "random"])
def test_a_name_that_scalarizers_have_too_is_the_scalarizer(method: str) -> None:
    assert not is_by_gradients(method)
    assert build_balance(BalanceConfig(method=method), TASKS).by_gradients is None


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_weights_of_torchjds_aggregator(method: str) -> None:
    torch.manual_seed(3)
    jacobian = torch.randn(3, 7)
    aggregator = getattr(aggregation, gradient_methods()[method])(**OPTIONS.get(method, {}))
    torch.manual_seed(0)
    expected = aggregator(jacobian)
    torch.manual_seed(0)
    weights = build(method)(jacobian.double() @ jacobian.double().T)
    torch.testing.assert_close(weights @ jacobian, expected, rtol=1e-3, atol=1e-5)


def test_building_a_method_draws_no_random_number() -> None:
    before = torch.get_rng_state()
    build("pcgrad")
    assert torch.equal(torch.get_rng_state(), before)


# Closed forms


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_mgda_of_two_tasks_is_the_shortest_vector_between_them(scale: float) -> None:
    a, b = torch.tensor([[3.0, 1.0], [-1.0, 2.0]], dtype=torch.float64) * scale
    products = torch.stack([torch.stack([a @ a, a @ b]), torch.stack([b @ a, b @ b])])
    # Sener and Koltun, arXiv 1810.04650, Algorithm 1.
    share = ((b - a) @ b / ((a - b) @ (a - b))).clamp(0, 1)
    weights = make_weighting("mgda", {})(products)
    assert weights.tolist() == pytest.approx([float(share), 1 - float(share)], rel=1e-5)


def test_pcgrad_of_two_tasks_takes_from_each_what_goes_against_the_other() -> None:
    products = gramian([1.0, 0.0], [-1.0, 1.0])
    # Yu et al., arXiv 2001.06782, Algorithm 1: g_a - (g_a g_b / |g_b|²) g_b, and the other way round.
    assert make_weighting("pcgrad", {})(products).tolist() == pytest.approx([1 + 1.0, 1 + 0.5])


# Odd Gramians


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 1e39])
def test_a_product_that_is_not_finite_gives_nan_and_the_method_is_not_asked(method: str, value: float) -> None:
    weighting = build(method)
    before = weighting.state()
    products = CONFLICT.clone()
    products[1, 1] = value
    if value == 1e39 and method in OF_ANY_SIZE:
        # Too large for float32 only before it is brought to another size.
        assert weighting(products).isfinite().all()
        return
    assert weighting(products).isnan().all()
    assert weighting.state() == before


@pytest.mark.parametrize("method", METHODS)
def test_fewer_than_two_gradients_are_not_balanced(method: str) -> None:
    for rows in (torch.zeros(3, 3), torch.diag(torch.tensor([4.0, 0.0, 0.0]))):
        combined = build(method).combine(TaskGradients(rows, torch.ones(3)))
        assert torch.equal(combined.of(rows), rows.sum(dim=0))


def test_a_task_without_a_gradient_does_not_stop_the_others() -> None:
    alone = make_weighting("mgda", {})(gramian([1.0, 0.0], [-0.5, 1.0]))
    weights = weights_of(build("mgda"), torch.tensor([[1.0, 0.0], [0.0, 0.0], [-0.5, 1.0]]))
    assert weights == [float(alone[0]), 0, float(alone[1])], "TorchJD alone would give all weight to the zero"


def test_a_gradient_whose_square_vanishes_in_the_precision_of_the_weighting_is_none() -> None:
    assert weights_of(build("mgda"), torch.tensor([[1.0, 0.0], [1e-30, 0.0], [0.0, 1.0]])) == [0.5, 0, 0.5]


# What is kept


@pytest.mark.parametrize("method", ["gradvac", "pcd"])
def test_what_a_method_gathers_goes_through_a_file_to_the_same_bits(method: str) -> None:
    products = [CONFLICT, CONFLICT.flip(0, 1), CONFLICT * 2]
    whole, first, second = (build(method) for _ in range(3))
    expected = [weigh(whole, each, number) for number, each in enumerate(products)]
    got = [weigh(first, products[0], 0)]
    tensors, rest = split(first.state())
    second.load_state(merge(tensors, json.loads(json.dumps(rest))))
    got += [weigh(second, each, number) for number, each in enumerate(products[1:], start=1)]
    assert [each.tolist() for each in got] == [each.tolist() for each in expected]
    assert weigh(build(method), products[2], 2).tolist() != expected[2].tolist(), "what came before counts"


def weigh(weighting: GradientWeighting, products: Tensor, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return weighting(products)


@pytest.mark.parametrize("method", ["gradvac", "pcd"])
def test_a_memory_is_a_copy_that_later_calls_leave_alone(method: str) -> None:
    weighting = build(method)
    weigh(weighting, CONFLICT, 0)
    memory = weighting.state()
    expected = weigh(weighting, CONFLICT, 1)
    for _ in range(2):
        weighting.load_state(memory)
        assert torch.equal(weigh(weighting, CONFLICT, 1), expected)


def test_a_method_does_not_continue_with_what_another_has_kept() -> None:
    other = build_balance(BalanceConfig(method="pcd"), TASKS)
    with pytest.raises(ValueError, match=r"method with \['_phi_t', '_state_key'\], got \['_n_steps'"):
        build_balance(BalanceConfig(method="gradvac"), TASKS).load_state(other.state(), torch.device("cpu"))
    with pytest.raises(ValueError, match="expected the state of a balancing method"):
        build_balance(BalanceConfig(method="uw"), TASKS).load_state(other.state(), torch.device("cpu"))


def test_a_method_of_gradients_has_nothing_in_a_state_dict_whatever_it_keeps() -> None:
    balance = build_balance(BalanceConfig(method="gradvac"), TASKS)
    assert isinstance(balance.by_gradients, GradientWeighting)
    balance.by_gradients(CONFLICT)
    assert balance.state_dict() == {} and list(balance.parameters()) == []


# What is refused


@pytest.mark.parametrize(
    "config, message",
    [
        (BalanceConfig(method="mgdb"), r"balance\.method: no method 'mgdb'; nearest: mgda"),
        (BalanceConfig(method="mgda", options={"eps": 1}), "mgda takes the options epsilon, max_iters, .*: got eps"),
        (BalanceConfig(method="mgda", options={"epsilon": -1.0}), "epsilon must be positive"),
        (BalanceConfig(method="alignedmtl", options={"pref_vector": [1.0, 2.0]}), "alignedmtl takes the options pref_"),
        (BalanceConfig(method="krum", options={"n_byzantine": 1}), "at least 4 rows"),
        (BalanceConfig(method="pcd", options={"tau": [0.1]}), "one value per secondary objective"),
    ],
)
def test_mistakes_are_named_with_the_choices(config: BalanceConfig, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        build_balance(config, TASKS)


MISSING = [
    ("upgrad", "qpsolvers", "mtl-freeze"),
    ("dualproj", "quadprog", "mtl-freeze"),
    ("cagrad", "cvxpy", "mtl-freeze[balance]"),
    ("cagrad", "clarabel", "mtl-freeze[balance]"),
    ("fairgrad", "scipy", "mtl-freeze[balance]"),
]


@pytest.mark.parametrize(("method", "package", "project"), MISSING)
def test_a_method_whose_packages_are_missing_names_the_command_that_installs_them(
    method: str, package: str, project: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    message = f"balance.method: {method} needs {package}, .*; install it with: pip install '{project}'"
    own = OPTIONS.get(method, {})
    for name, options in ((method, own), ("crmogm", {"method": method, "options": own})):
        with pytest.raises(SettingError, match=re.escape(message).replace(r"\.\*", ".*") + "$"):
            build_balance(BalanceConfig(method=name, options=options), TASKS)


# A new process, in which a package that is missing is missing for other packages too: cvxpy needs scipy.
WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == sys.argv[1]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
from mtl.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("package", ["cvxpy", "scipy"])
def test_a_plan_without_the_packages_of_a_method_is_exit_code_2(tmp_path: Path, package: str) -> None:
    changes = ("balance.method=cagrad", "balance.options={c: 0.5}")
    command = [sys.executable, "-c", WITHOUT, package, "plan", str(tiny_config(tmp_path)), *changes]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "balance.method: cagrad needs cvxpy" in done.stderr
    assert "pip install 'mtl-freeze[balance]'" in done.stderr


OF_ANY_SIZE = ["cagrad", "dualproj", "gradvac", "upgrad"]


@pytest.mark.parametrize("method", OF_ANY_SIZE)
@pytest.mark.parametrize("size", [1e-12, 1e-3, 0.3, 1e5])
def test_gradients_of_any_size_are_balanced_alike(method: str, size: float) -> None:
    expected = build(method)(CONFLICT)
    torch.testing.assert_close(build(method)(CONFLICT * size**2), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ratio", [1e-2, 1e-4, 1e-6])
def test_cagrad_moves_where_a_gradient_is_small_beside_the_others(ratio: float) -> None:
    rows = torch.tensor([[1.0, 0.0, 0.2], [-0.5, 1.0, 0.0], [0.3, 0.2, 1.0]], dtype=torch.float64)
    rows[2] *= ratio
    weights = build("cagrad")(rows @ rows.T).double()
    mean = rows.mean(0)
    # In the ball around the mean gradient, at its edge: equation 2 of the paper, c = 0.5.
    assert float((weights @ rows - mean).norm() / mean.norm()) == pytest.approx(0.5, rel=1e-3)
