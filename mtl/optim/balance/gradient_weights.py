"""Task weights computed from the Gramian of the tasks' gradients: TorchJD's weightings, found by name.

TorchJD's aggregators combine the rows of a Jacobian. This module offers those that compute their weights from the
Gramian (the rows' inner products); sources and formulas are in the docstrings of `torchjd.aggregation`. It is imported
where such a method is used only, since the aggregators import solvers, which takes most of a second.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torchjd import Stateful, aggregation, scalarization
from torchjd.aggregation import GramianWeightedAggregator, PCDWeighting, Weighting
from torchjd.linalg import QuadprogProjector

from mtl.config import SettingError
from mtl.optim.balance.state import check_same_method
from mtl.optim.balance.subset import Subset, narrowed, plain_attributes
from mtl.optim.task_gradients import inner_products

# TorchJD raises them for options that do not fit each other or the number of tasks.
OPTION_ERRORS = (TypeError, ValueError, RuntimeError, IndexError)


def gradient_methods() -> dict[str, str]:
    """The aggregators of TorchJD that weigh by the Gramian, by their name in a configuration: `upgrad`."""
    found = {name: getattr(aggregation, name) for name in aggregation.__all__ if name != "GramianWeightedAggregator"}
    return {name.lower(): name for name, kind in found.items() if issubclass(kind, GramianWeightedAggregator)}


def other_aggregators() -> frozenset[str]:
    """The other aggregators of TorchJD, by lower-case name."""
    names = {name.removesuffix("Weighting") for name in aggregation.__all__}
    abstract = {"", "Aggregator", "WeightedAggregator", "GramianWeightedAggregator"}
    ours = {*gradient_methods(), *map(str.lower, scalarization.__all__)}
    return frozenset(name.lower() for name in names - abstract) - ours


def build_weighting(method: str, options: Mapping[str, Any], num_tasks: int) -> GradientWeighting:
    """Makes a weighting.

    Args:
        method: One of `gradient_methods`.
        options: The aggregator's own. Those with a projector (`upgrad`, `dualproj`) take `norm_eps` and `reg_eps` of
            its quadratic program instead: gradients whose squared norms add up to less than `norm_eps` count as zero,
            and are not balanced.
        num_tasks: The number of tasks.

    Raises:
        SettingError: A package is missing, or an option is unknown, missing, or does not fit the number of tasks.
    """
    aggregator: type[GramianWeightedAggregator] = getattr(aggregation, gradient_methods()[method])
    takes, own = options_of(aggregator), dict(options)
    try:
        if "projector" in takes:
            takes = [name for name in takes if name != "projector"] + (inner := options_of(QuadprogProjector))
            own["projector"] = QuadprogProjector(**{name: own.pop(name) for name in inner if name in own})
        weighting = aggregator(**with_tensors(own)).gramian_weighting
        try_out_weighting(weighting, num_tasks)
    except ImportError as error:
        raise SettingError("balance.method", f"{method}: {error}") from error
    except OPTION_ERRORS as error:
        known = ", ".join(takes) or "none"
        raise SettingError("balance.options", f"{method} takes the options {known}: {error}") from error
    return GradientWeighting(weighting)


def try_out_weighting(weighting: Weighting[Any], num_tasks: int) -> None:
    """Calls a copy of a weighting on gradients that are orthogonal; what it raises shows what does not fit.

    Raises:
        ValueError: It does not give a weight for each task.
    """
    if num_tasks < 2:
        return
    with torch.random.fork_rng([]), torch.device("cpu"):
        weights = copy.deepcopy(weighting)(torch.eye(num_tasks))
    if weights.shape != (num_tasks,):
        raise ValueError(f"gave weights of shape {tuple(weights.shape)} for {num_tasks} tasks")


def with_tensors(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with tensors for the lists that a configuration writes: on the CPU, even if the model is on meta."""
    return {
        name: torch.tensor(value, dtype=torch.float32, device="cpu") if isinstance(value, list) else value
        for name, value in options.items()
    }


def options_of(kind: type) -> list[str]:
    """The names of what a class is constructed from."""
    return list(inspect.signature(kind).parameters)


class GradientWeighting:
    """A weighting of TorchJD as the training loop uses it.

    Not a module, since it has no parameters; its state, which its calls update, is on the CPU.
    """

    def __init__(self, weighting: Weighting[Any]) -> None:
        self._weighting = weighting

    def __call__(self, gramian: Tensor, subset: Subset | None = None) -> Tensor:
        """Computes the weights on the CPU: one sync with the device, where a solver would sync in every iteration.

        Args:
            gramian: "t t", the inner products of the tasks' gradients.
            subset: The tasks whose gradients they are, if not all have labels.

        Returns:
            The tasks' weights, "t", float32, on the CPU. All are 1 if fewer than two tasks have a gradient, and NaN if
            a product is not finite, so that the step's gradient is not finite either; in both cases the method is not
            called, and its state does not change.

        Raises:
            SettingError: The method cannot weigh so few tasks.
        """
        # In float32, the precision of the gradients: TorchJD's test for linear dependence relies on its rounding.
        products = gramian.detach().cpu().float()
        norms = products.diagonal()
        if not products.isfinite().all():
            return torch.full_like(norms, torch.nan)
        if subset is not None and isinstance(self._weighting, PCDWeighting) and 0 not in subset.places:
            # As with a primary objective whose gradient is zero.
            return torch.zeros_like(norms)
        has_gradient = norms > 0
        if has_gradient.sum() < 2:
            return torch.ones_like(norms)
        # A task without a gradient, such as one without a label in the batch, conflicts with no other. Methods would
        # take its zero for the minimum (MGDA), so it is replaced by a gradient orthogonal to the others.
        products = products + torch.diag(torch.where(has_gradient, 0.0, norms[has_gradient].mean()))
        if subset is None:
            weights: Tensor = self._weighting(products)
            return weights.detach()
        try:
            with narrowed(self._weighting, subset), _narrowed_tau(self._weighting, subset):
                weights = self._weighting(products)
        except OPTION_ERRORS as error:
            name, few = type(self._weighting).__name__, f"the {len(norms)} of {subset.size} tasks"
            message = f"{name} cannot weigh {few} of which a batch has labels: {error}"
            raise SettingError("balance.method", message) from error
        return weights.detach()

    def combine(self, rows: Tensor, subset: Subset | None = None) -> Tensor:
        """The weighted sum of the tasks' gradients, "p".

        Args:
            rows: "t p", the gradients.
            subset: The tasks whose gradients they are, if not all have labels.

        Raises:
            SettingError: As the call.
        """
        return self(inner_products(rows), subset).to(rows) @ rows

    def state(self) -> dict[str, Any]:
        """A copy of the method's state over its calls (GradVac, PCD), without its options."""
        if not isinstance(self._weighting, Stateful):
            return {}
        options = options_of(type(self._weighting))
        own = {n: value for n, value in plain_attributes(self._weighting).items() if n.lstrip("_") not in options}
        return {name: _to_plain(value) for name, value in {**own, **self._weighting._buffers}.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restores the state of the same method.

        Raises:
            ValueError: It is the state of another method.
        """
        check_same_method(self.state(), state)
        for name, value in state.items():
            setattr(self._weighting, name, _from_plain(value))


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


def _to_plain(value: Any) -> Any:
    """Tensors and JSON values; tuples and dtypes keep their type, or a method would reset its state on comparison."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, tuple):
        return {"tuple": [_to_plain(each) for each in value]}
    return {"type": str(value).removeprefix("torch.")} if isinstance(value, torch.dtype) else value


def _from_plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, Mapping):
        return tuple(map(_from_plain, value["tuple"])) if "tuple" in value else getattr(torch, value["type"])
    return value
