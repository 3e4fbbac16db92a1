"""The methods that look at the tasks' gradients, by their name in a configuration: how each is made of its options.

Imported where such a method is used only, since TorchJD's aggregators import solvers.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torchjd.aggregation import MoDoWeighting, SDMGradWeighting

from mtl.config import SettingError
from mtl.optim.balance.conflict_free import ConFig
from mtl.optim.balance.crmogm import CrMogm
from mtl.optim.balance.dbmtl import DbMtl
from mtl.optim.balance.excessmtl import ExcessMtl
from mtl.optim.balance.graddrop import GradDrop
from mtl.optim.balance.gradient_method import OPTION_ERRORS, GradientMethod, TaskGradients
from mtl.optim.balance.gradient_weights import (
    gradient_methods,
    make_weighting,
    weighting_options,
)
from mtl.optim.balance.gradnorm import GradNorm
from mtl.optim.balance.imtlg import ImtlG
from mtl.optim.balance.independent_batches import IndependentBatches
from mtl.optim.balance.mgda_normalized import NormalizedMgda
from mtl.optim.balance.moco import MoCo
from mtl.optim.balance.nashmtl import NashMtl
from mtl.optim.balance.probe_then_fix import ProbeThenFix
from mtl.optim.balance.torchjd_state import options_of, with_tensors
from mtl.optim.balance.trimmed_mean import TrimmedMean
from mtl.runtime.text import hint

# Made of the number of tasks and their options.
_OURS: Mapping[str, Callable[..., GradientMethod]] = {
    "config": ConFig,
    "dbmtl": DbMtl,
    "excessmtl": ExcessMtl,
    "graddrop": GradDrop,
    "gradnorm": GradNorm,
    "imtlg": ImtlG,
    "moco": MoCo,
    "nashmtl": NashMtl,
    "probe-then-fix": ProbeThenFix,
    "trimmedmean": TrimmedMean,
}
_OF_BATCHES: Mapping[str, type[MoDoWeighting] | type[SDMGradWeighting]] = {
    "modo": MoDoWeighting,
    "sdmgrad": SDMGradWeighting,
}


def method_names() -> list[str]:
    """The names of all methods that look at gradients."""
    return sorted({*gradient_methods(), *_OURS, *_OF_BATCHES, "crmogm"})


def method_options(method: str) -> dict[str, Any]:
    """A method's options, with their defaults; `Parameter.empty` for those without."""
    if method in _OURS:
        found = options_of(_OURS[method])
    elif method in _OF_BATCHES:
        found = options_of(_OF_BATCHES[method])
    elif method == "crmogm":
        found = options_of(_make_crmogm)
    elif method == "mgda":
        found = weighting_options(method) | {"normalize": "none", "apply": "raw"}
    else:
        found = weighting_options(method) | ({"rescale": False} if method == "cagrad" else {})
    return {name: value for name, value in found.items() if name != "num_tasks"}


def build_gradient_method(method: str, options: Mapping[str, Any], num_tasks: int) -> GradientMethod:
    """Makes a method, and tries it on gradients that are orthogonal.

    Args:
        method: One of `method_names`.
        options: Its own.
        num_tasks: The number of tasks.

    Raises:
        SettingError: A package is missing, or an option is unknown, missing, or does not fit the number of tasks.
    """
    try:
        if unknown := options.keys() - set(method_options(method)):
            raise TypeError(f"got {', '.join(sorted(unknown))}")
        made = _make(method, options, num_tasks)
        try_out(made, num_tasks)
    except SettingError:
        raise
    except OPTION_ERRORS as error:
        known = ", ".join(method_options(method)) or "none"
        raise SettingError("balance.options", f"{method} takes the options {known}: {error}") from error
    return made


def _make(method: str, options: Mapping[str, Any], num_tasks: int) -> GradientMethod:
    own = dict(options)
    if method in _OURS:
        _check_kinds(_OURS[method], own)
        return _OURS[method](num_tasks, **own)
    if method in _OF_BATCHES:
        return IndependentBatches(_OF_BATCHES[method](**with_tensors(own)), num_tasks)
    if method == "crmogm":
        return _make_crmogm(num_tasks, **own)
    if method == "mgda" and own.keys() & {"normalize", "apply"}:
        _check_kinds(NormalizedMgda, own)
        return NormalizedMgda(**own)
    is_rescaled = own.pop("rescale", False)
    if not isinstance(is_rescaled, bool):
        raise TypeError(f"expected rescale: true or false, got {is_rescaled!r}")
    # CAGrad's authors divide the direction, which is up to 1 + c times as long as the mean gradient.
    return make_weighting(method, own, 1 / (1 + float(own.get("c", 0.0)) ** 2) if is_rescaled else 1.0)


def _check_kinds(made_by: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raises `TypeError` for an option of another type than its annotation says."""
    kinds = {"float": (int | float, "a number"), "int": (int, "a whole number"), "str": (str, "text")}
    for name, parameter in inspect.signature(made_by).parameters.items():
        kind, words = kinds.get(str(parameter.annotation), (object, ""))
        value = options.get(name, parameter.default)
        if name in options and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not object)):
            raise TypeError(f"expected {name}: {words}, got {value!r}")


def _make_crmogm(
    num_tasks: int, method: str = "upgrad", options: Mapping[str, Any] | None = None, alpha: float = 0.9
) -> GradientMethod:
    _check_kinds(_make_crmogm, {"method": method, "alpha": alpha})
    if method not in method_names() or method == "crmogm":
        raise ValueError(f"there is no method {method!r} to smooth{hint(str(method), method_names())}")
    return CrMogm(build_gradient_method(method, options or {}, num_tasks), num_tasks, alpha)


def try_out(method: GradientMethod, num_tasks: int) -> GradientMethod:
    """Calls a copy of a method on gradients that are orthogonal; what it raises shows what does not fit.

    Returns:
        The copy, with the state of after the call; if there is one task only, it is not called.

    Raises:
        ValueError: It does not give a weight for each task.
    """
    with torch.random.fork_rng([]), torch.device("cpu"):
        tried = copy.deepcopy(method)
        if num_tasks < 2:
            return tried
        rows = torch.eye(num_tasks)
        found = tried._combine(TaskGradients(rows, torch.ones(num_tasks), (rows, rows, rows)))
    if found.weights is not None and found.weights.shape != (num_tasks,):
        raise ValueError(f"gave weights of shape {tuple(found.weights.shape)} for {num_tasks} tasks")
    return tried
