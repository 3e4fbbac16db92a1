"""From the `balance` of a configuration to the method: found by name, made of its options, and tried.

The methods are TorchJD's scalarizers and aggregators, our own, and the user's.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mtl.config import SettingError
from mtl.config.optim import BalanceConfig
from mtl.config.own import is_own, make_own, own_class
from mtl.optim.balance.balance import Balance
from mtl.optim.balance.dwa import PartialDwa
from mtl.optim.balance.presets import with_preset
from mtl.optim.balance.scalarizers import Constant, Scalarizer, Sum, scalarization
from mtl.optim.balance.state import check_state
from mtl.optim.balance.stch import stch
from mtl.optim.balance.sum_of_logs import SumOfLogs
from mtl.optim.balance.torchjd_state import options_of
from mtl.runtime.plugin import where_it_failed
from mtl.runtime.text import hint

if TYPE_CHECKING:
    from torchjd.aggregation import Weighting

    from mtl.optim.balance.gradient_method import GradientMethod
    from mtl.optim.balance.task_weights import TaskWeights

# Scalarizers of our own, some in the place of TorchJD's.
_OURS: Mapping[str, Callable[..., Scalarizer]] = {"dwa": PartialDwa, "si": SumOfLogs, "stch": stch}

# Given by the tasks, not by a configuration.
NAMES_OF_TASKS = ("shape", "num_tasks")


def scalarizers() -> dict[str, Callable[..., Scalarizer]]:
    """The scalarizers by their name in a configuration: those of TorchJD, `uw` -> `UW`, and our own."""
    names = [name for name in scalarization.__all__ if name not in ("Scalarizer", "Constant")]
    return {name.lower(): getattr(scalarization, name) for name in names} | dict(_OURS)


def is_by_gradients(method: str) -> bool:
    """Whether a method, by name, looks at the tasks' gradients.

    Raises:
        SettingError: It is a class of the user's own that cannot be had.
    """
    if is_own(method):
        return not issubclass(own_method(method), Scalarizer)
    # A name of both (mean, sum, random) is the scalarizer: the same result without a backward per task.
    if method == "fixed" or method.lower() in scalarizers():
        return False
    from mtl.optim.balance.gradient_methods import method_names

    return method.lower() in method_names()


def build_balance(config: BalanceConfig, tasks: Sequence[str], every_task: Sequence[str] = ()) -> Balance:
    """Makes the balancing method of a configuration.

    Args:
        config: Which method.
        tasks: The tasks whose losses it combines.
        every_task: All tasks of the run, which `weights` may name as well; `tasks` if not given.

    Raises:
        SettingError: The method is unknown, an option is unknown or missing, or `weights` does not name every task.
    """
    if config.method == "fixed":
        _check_on(config)
        return Balance(Constant(_fixed_weights(config.weights or {}, tasks, every_task or tasks)))
    if is_own(config.method):
        return _build_own(config, len(tasks))
    method = config.method.lower()
    given = with_preset(method, config.preset, config.options)
    _check_finite(given)
    for name in ("weights", "pref_vector"):
        if isinstance(values := given.get(name), list) and values and not any(values):
            raise SettingError("balance.options", f"expected a number other than 0 in {name}, got {values}")
    if is_by_gradients(method):
        from mtl.optim.balance.gradient_methods import build_gradient_method

        return _by_gradients(config, build_gradient_method(method, given, len(tasks)))
    if (scalarizer := scalarizers().get(method)) is None:
        raise SettingError("balance.method", _no_method(config.method))
    _check_on(config)
    takes = options_of(scalarizer)
    # A configuration writes tensors as lists; learnable methods need the number of losses.
    options = {k: torch.tensor(v, dtype=torch.float32) if isinstance(v, list) else v for k, v in given.items()}
    options |= {name: len(tasks) for name in NAMES_OF_TASKS if name in takes}
    try:
        return Balance(scalarizer(**options))
    except (TypeError, ValueError) as error:
        known = ", ".join(name for name in takes if name not in NAMES_OF_TASKS) or "none"
        raise SettingError("balance.options", f"{config.method} takes the options {known}: {error}") from error


def _check_finite(options: Mapping[str, Any]) -> None:
    """Raises `SettingError` if a number among options, or in lists and mappings of them, is NaN or infinite."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            _check_finite(value)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise SettingError("balance.options", f"expected {name}: a finite number, got {number}")


def _by_gradients(config: BalanceConfig, method: GradientMethod) -> Balance:
    """A method that looks at gradients, checked against where it is to look."""
    if config.on != "parameters" and (why := _why_not(method, config)):
        raise SettingError("balance.on", f"{config.method} {why}")
    on = config.on if isinstance(config.on, str) else config.on.layer
    return Balance(Sum(), method, on, config.per_sample)


def _why_not(method: GradientMethod, config: BalanceConfig) -> str | None:
    """Why a method cannot look at features or a layer, whose gradients are those of one batch a step; None if it can.

    Features are those of a batch's images. Summed over them, their gradients are those of a bias that all images share:
    a method may remember them, and weigh by them. Weights apply to every gradient; a gradient that a method makes
    itself applies to those images alone.
    """
    on_features = config.on == "features"
    if method.num_batches > 1:
        num = method.num_batches
        return f"compares {num} batches of a step, of which features and layers take one; expected parameters"
    if not method.weighs:
        if not on_features:
            return "makes a gradient of its own, which would be that of the layer alone; expected parameters"
        if method.remembers_rows:
            return "makes a gradient of those of earlier steps, which are of other images; expected parameters"
        if not config.per_sample:
            why = "makes a gradient of its own, which features can take image by image only"
            return f"{why}; expected parameters, or features with per_sample: true"
    elif method.remembers_rows and config.per_sample:
        return "remembers the entries of gradients, which are of other images in each step; expected per_sample: false"
    return None


def _check_on(config: BalanceConfig) -> None:
    """Raises `SettingError` if `on` is given for a method that looks at losses."""
    if config.on != "parameters":
        raise SettingError("balance.on", f"{config.method} looks at no gradients; leave it out")


def own_method(method: str) -> type[Scalarizer] | type[Weighting[Any]] | type[TaskWeights]:
    """A balancing method of the user's own.

    Raises:
        SettingError: It cannot be imported, or is neither a `Scalarizer` nor a `Weighting` of TorchJD, nor a
            `TaskWeights`.
    """
    from torchjd.aggregation import Weighting

    from mtl.optim.balance.task_weights import TaskWeights

    return own_class(method, "balance.method", Scalarizer, Weighting, TaskWeights)


def _build_own(config: BalanceConfig, num_tasks: int) -> Balance:
    """A method of the user's own, tried with losses and gradients of 1."""
    if config.preset is not None:
        raise SettingError("balance.preset", f"{config.method} is your own and has none")
    method = make_own(own_method(config.method), config.options, "balance.options", config.method)
    from torchjd.aggregation import Weighting

    from mtl.optim.balance.gradient_methods import try_out
    from mtl.optim.balance.gradient_weights import GradientWeighting

    try:
        if not isinstance(method, Scalarizer):
            weighing = GradientWeighting(method) if isinstance(method, Weighting) else method
            tried_out = try_out(weighing, num_tasks)
            new, used = (Balance(Sum(), each).state()["weighting"] for each in (weighing, tried_out))
            check_state(config.method, new, used)
            return _by_gradients(config, weighing)
        with torch.random.fork_rng([]), torch.device("cpu"):
            tried = copy.deepcopy(method)
            total = tried(torch.ones(num_tasks))
        check_state(config.method, Balance(method).state(), Balance(tried).state())
    except SettingError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise SettingError("balance.options", f"{config.method}: {where_it_failed(error)}") from error
    _check_on(config)
    if total.shape != ():
        message = f"{config.method} gave {tuple(total.shape)} for {num_tasks} losses; expected a scalar"
        raise SettingError("balance.method", message)
    return Balance(method)


def _no_method(name: str) -> str:
    from mtl.optim.balance.gradient_methods import method_names

    names, by_gradients = scalarizers(), method_names()
    choices = (
        f"there are: fixed, {', '.join(sorted(names))}; by gradients: {', '.join(by_gradients)};"
        " or your own as package.module:Name"
    )
    return f"no method {name!r}{hint(name.lower(), [*names, *by_gradients])}; {choices}"


def _fixed_weights(weights: Mapping[str, float], tasks: Sequence[str], every_task: Sequence[str]) -> Tensor:
    if not set(tasks) <= set(weights) <= set(every_task):
        extra = [name for name in weights if name not in every_task]
        got = f"; there is no task {extra[0]!r}{hint(extra[0], every_task)}" if extra else f", got {', '.join(weights)}"
        raise SettingError("balance.weights", f"expected a weight for each of {', '.join(tasks)}{got}")
    if not any(weights[task] for task in tasks):
        raise SettingError("balance.weights", f"expected a weight above 0 for at least one of {', '.join(tasks)}")
    return torch.tensor([weights[task] for task in tasks])
