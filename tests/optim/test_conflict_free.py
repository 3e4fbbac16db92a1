"""ConFIG from the Gramian: the paper's definition, TorchJD's results on short rows, rows as long as a real trunk's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchjd.aggregation import ConFIG, IMTLGWeighting

from mtl.config import SettingError
from mtl.config.optim import BalanceConfig
from mtl.optim.balance.build import build_balance
from mtl.optim.balance.gradient_method import TaskGradients
from mtl.optim.balance.gradient_methods import build_gradient_method
from mtl.optim.balance.subset import Subset

ROWS = torch.tensor([[1.0, -2.0, 0.5, 0.0], [-1.0, -1.0, 2.0, 3.0], [0.5, 4.0, 1.0, -1.0], [2.0, 0.0, -3.0, 1.0]])


def combined(rows: Tensor, subset: Subset | None = None, **options: Any) -> Tensor:
    method = build_gradient_method("config", options, len(rows) if subset is None else subset.size)
    return method.combine(TaskGradients(rows, torch.ones(len(rows)), subset=subset)).of(rows)


def check_definition(rows: Tensor, found: Tensor, shares: Tensor) -> None:
    """Equation 2: the direction has these shares of the unit gradients, and is in their span; the length adds up."""
    exact, direction = rows.double(), found.double() / found.double().norm()
    cosines = (exact / exact.norm(dim=1, keepdim=True)) @ direction
    torch.testing.assert_close(cosines / cosines.norm(), shares.double() / shares.norm(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.double().norm(), (exact @ direction).sum(), rtol=1e-4, atol=0.0)


def test_it_conflicts_with_no_task_and_is_as_long_as_their_projections() -> None:
    check_definition(ROWS, combined(ROWS), torch.ones(4))
    shares = torch.tensor([1.0, 2.0, 0.5, 3.0])
    check_definition(ROWS, combined(ROWS, pref_vector=shares.tolist()), shares)


@given(st.integers(2, 6), st.integers(0, 10_000), st.floats(0, 3))
def test_on_short_rows_it_is_torchjds(num: int, seed: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num, 40, generator=generator, dtype=torch.float64)
    rows *= 10 ** (spread * torch.rand(num, 1, generator=generator, dtype=torch.float64))
    expected = ConFIG()(rows)
    torch.testing.assert_close(combined(rows), expected, rtol=1e-5, atol=1e-5 * float(expected.norm()))


@pytest.mark.parametrize("length", [3_000_000, 9_000_000])
def test_rows_as_long_as_a_trunk_keep_every_direction(length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, length, generator=generator) + 0.2 * torch.randn(2, length, generator=generator)
    check_definition(rows, combined(rows), torch.ones(2))


@pytest.mark.parametrize("ratio", [1.0, 1e-3, 1e-7])
def test_imtlg_has_equal_products_with_all_unit_gradients_at_any_ratio(ratio: float) -> None:
    rows = ROWS.double()
    rows[1] *= ratio
    weights = build_gradient_method("imtlg", {}, 4).combine(TaskGradients(rows, torch.ones(4))).weights
    assert weights is not None and float(weights.sum()) == pytest.approx(1, abs=1e-5)
    shares = (rows / rows.norm(dim=1, keepdim=True)) @ (weights.double() @ rows)
    torch.testing.assert_close(shares / shares[0], torch.ones(4).double(), rtol=1e-4, atol=0.0)
    if ratio == 1:
        torch.testing.assert_close(weights, IMTLGWeighting()(rows @ rows.T).float(), rtol=1e-4, atol=1e-5)


def test_imtlg_of_gradients_that_cancel_is_nothing() -> None:
    for rows in (torch.stack([ROWS[0], -ROWS[0]]), torch.stack([ROWS[0], ROWS[1], -ROWS[0] - ROWS[1]])):
        method = build_gradient_method("imtlg", {}, len(rows))
        found = method.combine(TaskGradients(rows, torch.ones(len(rows)))).of(rows)
        assert found.norm() < 10 * ROWS.norm()


def test_gradients_of_one_direction_are_one() -> None:
    rows = torch.stack([ROWS[0], 3 * ROWS[0], ROWS[1]])
    found = combined(rows)
    check_definition(rows, found, torch.ones(3))
    torch.testing.assert_close(found, ConFIG()(rows.double()).float(), rtol=1e-4, atol=1e-4)
    # Opposite ones have no such direction.
    for factor in (0.3, 1.0, 2.0, 7.1):
        assert torch.equal(combined(torch.stack([ROWS[0], -factor * ROWS[0]])), torch.zeros(4))


def test_a_task_without_a_gradient_leaves_the_step_with_its_preference() -> None:
    shares = [1.0, 2.0, 0.5, 3.0]
    rows = ROWS.clone()
    rows[2] = 0
    expected = combined(ROWS[[0, 1, 3]], pref_vector=[1.0, 2.0, 3.0])
    torch.testing.assert_close(combined(rows, pref_vector=shares), expected)
    torch.testing.assert_close(combined(ROWS[[0, 1, 3]], Subset((0, 1, 3), 4), pref_vector=shares), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pref": [1.0, 1.0, 1.0]}, "config takes the options pref_vector: got pref"),
        ({"pref_vector": [1.0, 1.0]}, "config takes the options pref_vector: .* entry for each of 3 tasks"),
        ({"pref_vector": 1.0}, "config takes the options pref_vector"),
        ({"pref_vector": "abc"}, "config takes the options pref_vector"),
        ({"pref_vector": [0, 0, 0]}, "expected a number other than 0 in pref_vector"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=rf"balance\.options: {message}"):
        build_balance(BalanceConfig(method="config", options=options), ["a", "b", "c"])
