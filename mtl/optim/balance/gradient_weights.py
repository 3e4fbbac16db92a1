"""Weights that follow from how the tasks' gradients lie to each other: TorchJD's weightings, found by name.

TorchJD's aggregators combine the rows of a Jacobian. Those whose weights it takes from the Gramian, the inner products
of the rows, are what there is here; sources and formulas are in the docstrings of `torchjd.aggregation`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchjd import Stateful, aggregation, scalarization
from torchjd.aggregation import GramianWeightedAggregator, Weighting
from torchjd.linalg import QuadprogProjector

from mtl.config import SettingError

# What a module of torch keeps of itself.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
# What TorchJD raises for options that do not fit each other or the number of tasks.
_MISFITS = (TypeError, ValueError, RuntimeError, IndexError)


def gradient_methods() -> dict[str, str]:
    """The aggregators of TorchJD that weigh by a Gramian, by the name that a configuration writes: `upgrad`."""
    found = {name: getattr(aggregation, name) for name in aggregation.__all__ if name != "GramianWeightedAggregator"}
    return {name.lower(): name for name, kind in found.items() if issubclass(kind, GramianWeightedAggregator)}


def other_aggregators() -> frozenset[str]:
    """What else of TorchJD combines gradients, by lower-case name."""
    names = {name.removesuffix("Weighting") for name in aggregation.__all__}
    abstract = {"", "Aggregator", "WeightedAggregator", "GramianWeightedAggregator"}
    ours = {*gradient_methods(), *map(str.lower, scalarization.__all__)}
    return frozenset(name.lower() for name in names - abstract) - ours


def build_weighting(method: str, options: Mapping[str, Any], num_tasks: int) -> GradientWeighting:
    """Makes a weighting.

    Args:
        method: One of `gradient_methods`.
        options: The aggregator's own. For those with a projector (`upgrad`, `dualproj`), `norm_eps` and `reg_eps` of
            its quadratic program stand in its place: gradients whose squared norms add up to less than `norm_eps`
            count as zero, and are not balanced.
        num_tasks: How many tasks there are.

    Raises:
        SettingError: A package is missing, or the options are not taken, lacking, or do not fit the number of tasks.
    """
    aggregator: type[GramianWeightedAggregator] = getattr(aggregation, gradient_methods()[method])
    takes, own = _parameters(aggregator), dict(options)
    try:
        if "projector" in takes:
            takes = [name for name in takes if name != "projector"] + (inner := _parameters(QuadprogProjector))
            own["projector"] = QuadprogProjector(**{name: own.pop(name) for name in inner if name in own})
        # Lists are written for tensors. The weights are made on the CPU, wherever the model is drawn up.
        own = {
            k: torch.tensor(v, dtype=torch.float32, device="cpu") if isinstance(v, list) else v for k, v in own.items()
        }
        weighting = aggregator(**own).gramian_weighting
        if num_tasks > 1:
            with torch.random.fork_rng([]), torch.device("cpu"):
                copy.deepcopy(weighting)(torch.eye(num_tasks))
    except ImportError as error:
        raise SettingError("balance.method", f"{method}: {error}") from error
    except _MISFITS as error:
        there = ", ".join(takes) or "none"
        raise SettingError("balance.options", f"{method} takes the options {there}: {error}") from error
    return GradientWeighting(weighting)


def _parameters(kind: type) -> list[str]:
    return list(inspect.signature(kind).parameters)


class GradientWeighting:
    """A weighting of TorchJD as the training loop uses it.

    No module, for nothing of it is learned: what it keeps comes and goes with its calls, and is on the CPU.
    """

    def __init__(self, weighting: Weighting[Any]) -> None:
        self._weighting = weighting

    def __call__(self, gramian: Tensor) -> Tensor:
        """Waits for the device once; solvers would wait for it at every turn.

        Args:
            gramian: "t t", the inner products of the tasks' gradients.

        Returns:
            The tasks' weights, "t", float32, on the CPU. They are all 1 if fewer than two tasks have a gradient, and
            NaN if a product is not finite, which makes the step's gradient what it has to be; in both cases the method
            is not asked, and keeps what it keeps.
        """
        # Of float32, whose rounding the gradients have: by it TorchJD tells which of them depend on others.
        products = gramian.detach().cpu().float()
        norms = products.diagonal()
        if not products.isfinite().all():
            return torch.full_like(norms, torch.nan)
        moving = norms > 0
        if moving.sum() < 2:
            return torch.ones_like(norms)
        # A task that moves nothing, such as one without a label in the batch, is in no one's way. Methods would take
        # its zero for all that there is to win (MGDA), so it stands in as a gradient at right angles to the others.
        products = products + torch.diag(torch.where(moving, 0.0, norms[moving].mean()))
        weights: Tensor = self._weighting(products)
        return weights.detach()

    def memory(self) -> dict[str, Any]:
        """What the method has gathered over its calls (GradVac, PCD), in copies; its options are not part of it."""
        if not isinstance(self._weighting, Stateful):
            return {}
        options = _parameters(type(self._weighting))
        kept = {name: value for name, value in kept_outside(self._weighting).items() if name.lstrip("_") not in options}
        return {name: _plain(value) for name, value in {**kept, **self._weighting._buffers}.items()}

    def load_memory(self, memory: Mapping[str, Any]) -> None:
        """Goes on with what the same method gathered elsewhere.

        Raises:
            ValueError: Another method gathered it.
        """
        check_same_kept(self.memory(), memory)
        for name, value in memory.items():
            setattr(self._weighting, name, _as_kept(value))


def kept_outside(module: nn.Module) -> dict[str, Any]:
    """What a method keeps outside its parameters and buffers."""
    return {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}


def check_same_kept(own: Mapping[str, Any], memory: Mapping[str, Any]) -> None:
    """Raises `ValueError` if a memory is that of another method."""
    if own.keys() != memory.keys():
        raise ValueError(f"a balancing method that keeps {sorted(own)} cannot go on with {sorted(memory)}")


def _plain(value: Any) -> Any:
    """Tensors and what JSON can hold; methods compare tuples of types with their own, and begin anew if they differ."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, tuple):
        return {"tuple": [_plain(each) for each in value]}
    return {"type": str(value).removeprefix("torch.")} if isinstance(value, torch.dtype) else value


def _as_kept(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, Mapping):
        return tuple(map(_as_kept, value["tuple"])) if "tuple" in value else getattr(torch, value["type"])
    return value
