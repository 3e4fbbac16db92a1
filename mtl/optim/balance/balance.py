"""`Balance`: the tasks' losses combined to the scalar that is minimised.

The methods are TorchJD's scalarizers, and those of its aggregators that weigh the tasks' gradients; this module finds
them by name and calls them after steps, epochs and phases.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mtl.config import SettingError
from mtl.config.optim import BalanceConfig
from mtl.config.own import is_own, make_own, own_class
from mtl.optim.balance.dwa import PartialDwa
from mtl.optim.balance.scalarizers import (
    DWA,
    FAMO,
    IMTLL,
    UW,
    Constant,
    Mean,
    Random,
    Scalarizer,
    Sum,
    scalarization,
)
from mtl.optim.balance.state import check_same_method
from mtl.optim.balance.subset import Subset, combine, plain_attributes, update_famo
from mtl.optim.balance.sum_of_logs import SumOfLogs
from mtl.runtime.plugin import where_it_failed
from mtl.runtime.text import hint

if TYPE_CHECKING:
    from torchjd.aggregation import Weighting

    from mtl.optim.balance.gradient_aggregator import GradientAggregator
    from mtl.optim.balance.gradient_weights import GradientWeighting

# Linear in the losses: combining micro-batches one by one gives the same sum as combining them at once.
_LINEAR = (Constant, DWA, IMTLL, Mean, Random, Sum, UW)


# Scalarizers of our own, some in the place of TorchJD's.
_OURS: Mapping[str, type[Scalarizer]] = {"dwa": PartialDwa, "si": SumOfLogs}


def scalarizers() -> dict[str, type[Scalarizer]]:
    """The scalarizers by their name in a configuration: those of TorchJD, `uw` -> `UW`, and our own."""
    names = [name for name in scalarization.__all__ if name not in ("Scalarizer", "Constant")]
    return {name.lower(): getattr(scalarization, name) for name in names} | dict(_OURS)


def is_by_gradients(method: str) -> bool:
    """Whether a method, by name, looks at the tasks' gradients.

    Raises:
        SettingError: It is a class of the user's own that cannot be had.
    """
    if is_own(method):
        from torchjd.aggregation import Weighting

        return issubclass(own_method(method), Weighting)
    # A name of both (mean, sum, random) is the scalarizer: the same result without a backward per task.
    if method == "fixed" or method.lower() in scalarizers():
        return False
    from mtl.optim.balance.gradient_aggregator import aggregator_methods
    from mtl.optim.balance.gradient_weights import gradient_methods

    return method.lower() in (gradient_methods() | aggregator_methods())


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
        return Balance(Constant(_fixed_weights(config.weights or {}, tasks, every_task or tasks)))
    if is_own(config.method):
        return _build_own(config, len(tasks))
    method = config.method.lower()
    for name in ("weights", "pref_vector"):
        if isinstance(given := config.options.get(name), list) and given and not any(given):
            raise SettingError("balance.options", f"expected a number other than 0 in {name}, got {given}")
    if is_by_gradients(method):
        from mtl.optim.balance.gradient_aggregator import aggregator_methods, build_aggregator
        from mtl.optim.balance.gradient_weights import build_weighting

        if method in aggregator_methods():
            return Balance(Sum(), build_aggregator(method, config.options, len(tasks)))
        return Balance(Sum(), build_weighting(method, config.options, len(tasks)))
    if (scalarizer := scalarizers().get(method)) is None:
        raise SettingError("balance.method", _no_method(config.method))
    parameters = dict(inspect.signature(scalarizer).parameters)
    # A configuration writes tensors as lists; learnable methods need the number of losses.
    options = {k: torch.tensor(v, dtype=torch.float32) if isinstance(v, list) else v for k, v in config.options.items()}
    if "shape" in parameters:
        options["shape"] = len(tasks)
    try:
        return Balance(scalarizer(**options))
    except (TypeError, ValueError) as error:
        takes = ", ".join(name for name in parameters if name != "shape") or "none"
        raise SettingError("balance.options", f"{config.method} takes the options {takes}: {error}") from error


def own_method(method: str) -> type[Scalarizer] | type[Weighting[Any]]:
    """A balancing method of the user's own.

    Raises:
        SettingError: It cannot be imported, or is neither a `Scalarizer` nor a `Weighting` of TorchJD.
    """
    from torchjd.aggregation import Weighting

    return own_class(method, "balance.method", Scalarizer, Weighting)


def _build_own(config: BalanceConfig, num_tasks: int) -> Balance:
    """A method of the user's own, tried with losses and gradients of 1."""
    method = make_own(own_method(config.method), config.options, "balance.options", config.method)
    from torchjd.aggregation import Weighting

    from mtl.optim.balance.gradient_weights import GradientWeighting, try_out_weighting

    try:
        if isinstance(method, Weighting):
            try_out_weighting(method, num_tasks)
            return Balance(Sum(), GradientWeighting(method))
        with torch.random.fork_rng([]), torch.device("cpu"):
            total = copy.deepcopy(method)(torch.ones(num_tasks))
    except Exception as error:  # the user's code may raise anything
        raise SettingError("balance.options", f"{config.method}: {where_it_failed(error)}") from error
    if total.shape != ():
        message = f"{config.method} gave {tuple(total.shape)} for {num_tasks} losses; expected a scalar"
        raise SettingError("balance.method", message)
    return Balance(method)


def _no_method(name: str) -> str:
    from mtl.optim.balance.gradient_aggregator import aggregator_methods
    from mtl.optim.balance.gradient_weights import gradient_methods, other_aggregators

    names, by_gradients = scalarizers(), gradient_methods() | aggregator_methods()
    choices = (
        f"there are: fixed, {', '.join(sorted(names))}; by gradients: {', '.join(sorted(by_gradients))};"
        " or your own as package.module:Name"
    )
    if name.lower() in other_aggregators() - aggregator_methods().keys():
        why = "it needs several batches, or memory of the gradients of earlier steps"
        return f"{name!r} is not supported: {why}; {choices}"
    return f"no method {name!r}{hint(name.lower(), [*names, *by_gradients])}; {choices}"


def _fixed_weights(weights: Mapping[str, float], tasks: Sequence[str], every_task: Sequence[str]) -> Tensor:
    if not set(tasks) <= set(weights) <= set(every_task):
        extra = [name for name in weights if name not in every_task]
        got = f"; there is no task {extra[0]!r}{hint(extra[0], every_task)}" if extra else f", got {', '.join(weights)}"
        raise SettingError("balance.weights", f"expected a weight for each of {', '.join(tasks)}{got}")
    if not any(weights[task] for task in tasks):
        raise SettingError("balance.weights", f"expected a weight above 0 for at least one of {', '.join(tasks)}")
    return torch.tensor([weights[task] for task in tasks])


class Balance(nn.Module):
    """A balancing method as the training loop uses it.

    A task without a label in a step leaves it, as if the method had been made for the others; see docs/mixed_data.md.

    Attributes:
        scalarizer: TorchJD's method; its learned parameters are named `balance.scalarizer.*`.
        param_groups: Parameters that the method steps itself (FAMO), in the form of an optimizer's; the run's optimizer
            must not hold them.
        by_gradients: If given, it makes one gradient of those of parameters that the tasks share, and the scalarizer
            only computes the value of the loss.
    """

    def __init__(
        self, scalarizer: Scalarizer, by_gradients: GradientWeighting | GradientAggregator | None = None
    ) -> None:
        super().__init__()
        self.scalarizer = scalarizer
        self.by_gradients = by_gradients
        # TorchJD has weights and reference points as plain attributes, which `.to(device)` would not move.
        for name, value in list(vars(scalarizer).items()):
            if isinstance(value, Tensor):
                delattr(scalarizer, name)
                scalarizer.register_buffer(name, value)
        own = list(scalarizer.parameters()) if hasattr(scalarizer, "update") else []
        self.param_groups: list[dict[str, Any]] = [{"params": own}] if own else []

    @property
    def follows_steps(self) -> bool:
        """Whether the method learns from the losses after a step (FAMO)."""
        return hasattr(self.scalarizer, "update")

    @property
    def may_draw(self) -> bool:
        """Whether the method may draw random numbers, as for weights or for the order of tasks."""
        if self.by_gradients is not None or isinstance(self.scalarizer, Random):
            return True
        return type(self.scalarizer).__module__.partition(".")[0] not in ("torchjd", "mtl")

    @property
    def adds_up(self) -> bool:
        """Whether combining several batches' losses one by one gives the step of one large batch."""
        return self.by_gradients is None and isinstance(self.scalarizer, _LINEAR)

    def forward(self, losses: Tensor, subset: Subset | None = None) -> Tensor:
        """Args:
            losses: "t", the tasks' losses in the order of the configuration.
            subset: The tasks whose losses they are, if not all have labels: the others leave the step, and what the
                method has learned of them stays.

        Returns:
            The loss to minimise, a scalar.
        """
        if subset is None:
            total: Tensor = self.scalarizer(losses)
            return total
        if isinstance(self.scalarizer, PartialDwa):
            return self.scalarizer.combine(losses, subset)
        return combine(self.scalarizer, losses, subset)

    def after_step(self, losses: Tensor, subset: Subset | None = None) -> None:
        """Passes the losses after a step to a method that follows steps.

        Only FAMO takes those of some tasks; a method of the user's own is left as it was.

        As in FAMO's own code, they come from another forward in train mode, in which running statistics of trainable
        BatchNorm layers move once more.

        Args:
            losses: "t", of the same batch, without a graph.
            subset: As for `forward`.
        """
        scalarizer: Any = self.scalarizer
        if subset is None:
            scalarizer.update(losses)
        elif isinstance(scalarizer, FAMO):
            update_famo(scalarizer, losses, subset)

    def after_epoch(self) -> None:
        """Ends a pass over the data (DWA compares passes)."""
        step: Any = getattr(self.scalarizer, "step", None)
        if step is not None:
            step()

    def state(self) -> dict[str, Any]:
        """The method's state outside its parameters and buffers, which its `state_dict` lacks: losses of earlier passes
        (DWA), its own optimizer (FAMO).
        """
        # A freeze replaces `train` by an instance attribute.
        own = {name: value for name, value in plain_attributes(self.scalarizer).items() if name != "train"}
        weighting = {} if self.by_gradients is None else {"weighting": self.by_gradients.state()}
        return weighting | {
            name: {"optimizer": type(value).__name__, "state": value.state_dict()}
            if isinstance(value, Optimizer)
            else value
            for name, value in own.items()
        }

    def load_state(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restores the state of the same method.

        Args:
            state: From `state`.
            device: The device of the losses.

        Raises:
            ValueError: It is the state of another method.
        """
        check_same_method(self.state(), state)
        for name, value in state.items():
            if name == "weighting" and self.by_gradients is not None:
                self.by_gradients.load_state(value)
            elif isinstance(value, Mapping) and "optimizer" in value:
                # The method creates its optimizer at its first step; the settings are part of the optimizer's state.
                kind: Any = getattr(torch.optim, value["optimizer"])
                optimizer = kind(list(self.scalarizer.parameters()))
                optimizer.load_state_dict(dict(value["state"]))
                setattr(self.scalarizer, name, optimizer)
            else:
                setattr(self.scalarizer, name, _on(device, value))

    def after_phase(self) -> None:
        """Ends a phase: an unfinished pass does not count in the next phase (DWA)."""
        # TorchJD's `reset` would drop the earlier passes as well.
        dwa: Any = self.scalarizer
        if getattr(dwa, "_loss_sum", None) is not None:
            dwa._loss_sum, dwa._n_batches = None, 0


def _on(device: torch.device, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return [_on(device, each) for each in value] if isinstance(value, list | tuple) else value
