"""Task weights computed from the Gramian of the tasks' gradients: TorchJD's weightings, found by name.

TorchJD's aggregators combine the rows of a Jacobian. This module offers those that compute their weights from the
Gramian (the rows' inner products); sources and formulas are in the docstrings of `torchjd.aggregation`. It is imported
where such a method is used only, since the aggregators import solvers, which takes most of a second.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torchjd import Stateful, aggregation
from torchjd.aggregation import GramianWeightedAggregator, PCDWeighting, Weighting
from torchjd.linalg import QuadprogProjector

from mtl.config import SettingError
from mtl.optim.balance.gradient_method import Combined, GradientMethod, TaskGradients
from mtl.optim.balance.subset import Subset, narrowed
from mtl.optim.balance.torchjd_state import options_of, restore_state, state_of, with_tensors

# The packages of their solvers, and what has them among its requirements. TorchJD passes over what it cannot import.
_SOLVERS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "cagrad": (("cvxpy", "clarabel"), "mtl-freeze[balance]"),
    "dualproj": (("qpsolvers", "quadprog"), "mtl-freeze"),
    "fairgrad": (("scipy", "scipy.optimize"), "mtl-freeze[balance]"),
    "upgrad": (("qpsolvers", "quadprog"), "mtl-freeze"),
}

# Their weights do not depend on the gradients' size, but the constants that keep them from dividing by zero do.
_OF_ANY_SIZE = ("cagrad", "dualproj", "gradvac", "upgrad")
# Where ours differ from TorchJD's: CAGrad's weights are all 0 where one gradient is a ten-thousandth of the others.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {"cagrad": {"norm_eps": 1e-9}}


def gradient_methods() -> dict[str, str]:
    """The aggregators of TorchJD that weigh by the Gramian, by their name in a configuration: `upgrad`.

    Without IMTL-G, which is our own.
    """
    names = [name for name in aggregation.__all__ if name not in ("GramianWeightedAggregator", "IMTLG")]
    found = {name: getattr(aggregation, name) for name in names}
    return {name.lower(): name for name, kind in found.items() if issubclass(kind, GramianWeightedAggregator)}


def weighting_options(method: str) -> dict[str, Any]:
    """The options of one of `gradient_methods`, with their defaults.

    Those with a projector (`upgrad`, `dualproj`) take `norm_eps` and `reg_eps` of its quadratic program instead.
    `norm_eps` is compared to the products of gradients that were brought to a mean square of about 1.
    """
    takes = options_of(getattr(aggregation, gradient_methods()[method]))
    if "projector" in takes:
        takes = {name: value for name, value in takes.items() if name != "projector"} | options_of(QuadprogProjector)
    return {**takes, **_DEFAULTS.get(method, {})}


def make_weighting(method: str, options: Mapping[str, Any], factor: float = 1.0) -> GradientWeighting:
    """Makes one of `gradient_methods` with its `weighting_options`; raises what TorchJD does if they do not fit.

    Args:
        method: Its name.
        options: Its own.
        factor: Multiplies the weights.

    Raises:
        SettingError: A package of its solver cannot be imported.
    """
    _import_solver(method)
    aggregator: type[GramianWeightedAggregator] = getattr(aggregation, gradient_methods()[method])
    own = {**_DEFAULTS.get(method, {}), **options}
    if "projector" in options_of(aggregator):
        inner = options_of(QuadprogProjector)
        own["projector"] = QuadprogProjector(**{name: own.pop(name) for name in inner if name in own})
    weighting = aggregator(**with_tensors(own)).gramian_weighting
    return GradientWeighting(weighting, factor, method in _OF_ANY_SIZE, method == "cagrad")


def _import_solver(method: str) -> None:
    packages, project = _SOLVERS.get(method, ((), ""))
    for package in packages:
        try:
            import_module(package)
        except ImportError as error:
            message = f"{method} needs {package.partition('.')[0]}, which cannot be imported ({error})"
            message += f"; install it with: pip install '{project}'"
            raise SettingError("balance.method", message) from error


class GradientWeighting(GradientMethod):
    """A weighting of TorchJD as the training loop uses it. Its state, which its calls update, is on the CPU."""

    def __init__(
        self, weighting: Weighting[Any], factor: float = 1.0, is_of_any_size: bool = False, is_exact: bool = False
    ) -> None:
        """Args:
        weighting: From a Gramian to weights.
        factor: Multiplies the weights.
        is_of_any_size: Whether the weights are the same for gradients that are all longer or shorter: they are given
            at a mean square of about 1.
        is_exact: Whether the Gramian is given in float64.
        """
        self._weighting = weighting
        self._factor = factor
        self._is_of_any_size = is_of_any_size
        self._is_exact = is_exact
        # Without its first task PCD moves nothing that is shared, however few the others are.
        self.least_tasks = 1 if isinstance(weighting, PCDWeighting) else 2

    @property
    def name(self) -> str:
        return type(self._weighting).__name__.removesuffix("Weighting")

    def __call__(self, gramian: Tensor, subset: Subset | None = None) -> Tensor:
        """Computes the weights on the CPU: one sync with the device, where a solver would sync in every iteration.

        Args:
            gramian: "t t", the inner products of the tasks' gradients, none of which is zero.
            subset: The tasks whose gradients they are, if not all have one.

        Returns:
            The tasks' weights, "t", float32, on the CPU. They are NaN if a product is not finite; the method is then
            not called, and its state does not change.
        """
        exact = gramian.detach().cpu()
        if self._is_of_any_size and 0 < (mean := float(exact.double().diagonal().mean())) < math.inf:
            # By a power of 2, which rounds nothing.
            exact = exact * 2.0 ** -round(math.log2(mean))
        # In float32, the precision of the gradients: TorchJD's test for linear dependence relies on its rounding.
        products = exact if self._is_exact else exact.float()
        norms = products.diagonal().float()
        if not products.isfinite().all():
            return torch.full_like(norms, torch.nan)
        if subset is not None and isinstance(self._weighting, PCDWeighting) and 0 not in subset.places:
            # As with a primary objective whose gradient is zero.
            return torch.zeros_like(norms)
        if len(norms) < 2:
            return torch.ones_like(norms)
        if subset is None:
            return self._scaled(self._weighting(products))
        with narrowed(self._weighting, subset), _narrowed_tau(self._weighting, subset):
            return self._scaled(self._weighting(products))

    def _scaled(self, weights: Tensor) -> Tensor:
        return weights.detach().float() * self._factor

    def _magnitudes(self, gradients: TaskGradients) -> Tensor:
        squares = gradients.products.diagonal()
        # As the method has them: a square that vanishes in float32 is a gradient of zero.
        return squares if self._is_of_any_size else squares.float()

    def _combine(self, gradients: TaskGradients) -> Combined:
        return Combined(weights=self(gradients.products, gradients.subset))

    def state(self) -> dict[str, Any]:
        """A copy of the method's state over its calls (GradVac, PCD), without its options."""
        return state_of(self._weighting) if isinstance(self._weighting, Stateful) else {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        restore_state(self._weighting, state)


@contextmanager
def _narrowed_tau(weighting: Weighting[Any], subset: Subset) -> Iterator[None]:
    """PCD's tau, which may have an entry for each task but the first."""
    tau = weighting.tau if isinstance(weighting, PCDWeighting) else None
    if not isinstance(weighting, PCDWeighting) or not isinstance(tau, Tensor):
        yield
        return
    weighting.tau = tau[[place - 1 for place in subset.places if place]]
    try:
        yield
    finally:
        weighting.tau = tau
