"""Balancing: how the losses of the tasks become the one number that is minimised.

The methods are TorchJD's scalarizers, and those of its aggregators that weigh the tasks' gradients; this module only
finds them by name and tells them what happens in the loop.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchjd import scalarization
from torchjd.scalarization import DWA, IMTLL, UW, Constant, Mean, Random, Scalarizer, Sum

from mtl.config import SettingError
from mtl.config.optim import BalanceConfig
from mtl.optim.balance.gradient_weights import (
    GradientWeighting,
    build_weighting,
    check_same_kept,
    gradient_methods,
    kept_outside,
    other_aggregators,
)
from mtl.runtime.text import hint

# Those of which the sum over micro-batches is what they make of the losses' sums.
_LINEAR = (Constant, DWA, IMTLL, Mean, Random, Sum, UW)


def method_names() -> dict[str, str]:
    """The scalarizers of TorchJD by the name that a configuration writes: `uw` -> `UW`."""
    return {name.lower(): name for name in scalarization.__all__ if name not in ("Scalarizer", "Constant")}


def is_by_gradients(method: str) -> bool:
    """Whether a method, by name, weighs the tasks' gradients."""
    return method.lower() in gradient_methods() and method.lower() not in method_names()


def build_balance(config: BalanceConfig, tasks: Sequence[str], every_task: Sequence[str] = ()) -> Balance:
    """Makes the balancing method of a configuration.

    Args:
        config: Which method.
        tasks: The tasks whose losses it combines.
        every_task: All tasks of the run, which `weights` may name as well; the same if not given.

    Raises:
        SettingError: No such method, options that it does not take or lacks, or weights that do not name every task.
    """
    if config.method == "fixed":
        return Balance(Constant(_fixed_weights(config.weights or {}, tasks, every_task or tasks)))
    method = config.method.lower()
    for name in ("weights", "pref_vector"):
        if isinstance(given := config.options.get(name), list) and given and not any(given):
            raise SettingError("balance.options", f"expected a number other than 0 in {name}, got {given}")
    # What both know by one name (mean, sum, random) is the scalarizer: the same, and without a look at gradients.
    if is_by_gradients(method):
        return Balance(Sum(), build_weighting(method, config.options, len(tasks)))
    names = method_names()
    if method not in names:
        raise SettingError("balance.method", _no_method(config.method))
    scalarizer: type[Scalarizer] = getattr(scalarization, names[method])
    parameters = dict(inspect.signature(scalarizer).parameters)
    # Lists are written for tensors; learnable methods want to know how many losses there are.
    options = {k: torch.tensor(v, dtype=torch.float32) if isinstance(v, list) else v for k, v in config.options.items()}
    if "shape" in parameters:
        options["shape"] = len(tasks)
    try:
        return Balance(scalarizer(**options))
    except (TypeError, ValueError) as error:
        takes = ", ".join(name for name in parameters if name != "shape") or "none"
        raise SettingError("balance.options", f"{config.method} takes the options {takes}: {error}") from error


def _no_method(name: str) -> str:
    names, by_gradients = method_names(), gradient_methods()
    there = f"there are: fixed, {', '.join(sorted(names))}; by gradients: {', '.join(sorted(by_gradients))}"
    if name.lower() in other_aggregators():
        why = "TorchJD makes its step of whole gradients or of several batches, not of weights from a Gramian"
        return f"{name!r} cannot be had here: {why}; {there}"
    return f"no method {name!r}{hint(name.lower(), [*names, *by_gradients])}; {there}"


def _fixed_weights(weights: Mapping[str, float], tasks: Sequence[str], every_task: Sequence[str]) -> Tensor:
    if not set(tasks) <= set(weights) <= set(every_task):
        extra = [name for name in weights if name not in every_task]
        got = f"; there is no task {extra[0]!r}{hint(extra[0], every_task)}" if extra else f", got {', '.join(weights)}"
        raise SettingError("balance.weights", f"expected a weight for each of {', '.join(tasks)}{got}")
    if not any(weights[task] for task in tasks):
        raise SettingError("balance.weights", f"expected a weight above 0 for one of {', '.join(tasks)} at least")
    return torch.tensor([weights[task] for task in tasks])


class Balance(nn.Module):
    """A balancing method as the training loop uses it.

    A task none of whose labels are in a batch has the loss 0 there, which a method takes for a task that is solved; if
    labels are often missing, `fixed` weights or `mean` are the safe choice.

    Attributes:
        scalarizer: TorchJD's method; parameters that it learns are named `balance.scalarizer.*`.
        param_groups: Parameters that the method steps itself (FAMO), in the form of an optimizer's; the run's own
            optimizer must leave them alone.
        weighting: If given, the gradients of what the tasks share are weighed by it, and the scalarizer says only what
            the loss is as a number.
    """

    def __init__(self, scalarizer: Scalarizer, weighting: GradientWeighting | None = None) -> None:
        super().__init__()
        self.scalarizer = scalarizer
        self.weighting = weighting
        # TorchJD keeps weights and reference points as plain attributes, which would not follow to a GPU.
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
    def adds_up(self) -> bool:
        """Whether the losses of several batches, each combined apart, give the step of one large batch."""
        return self.weighting is None and isinstance(self.scalarizer, _LINEAR)

    def forward(self, losses: Tensor) -> Tensor:
        """Args:
            losses: "t", the tasks' losses in the order of the configuration.

        Returns:
            The loss to minimise, a scalar.
        """
        total: Tensor = self.scalarizer(losses)
        return total

    def after_step(self, losses: Tensor) -> None:
        """Tells a method that follows steps what the losses are after one.

        As in FAMO's own code, those come from another forward in train mode, in which BatchNorm statistics of what
        trains move once more.

        Args:
            losses: "t", of the same batch, without a graph.
        """
        scalarizer: Any = self.scalarizer
        scalarizer.update(losses)

    def after_epoch(self) -> None:
        """Tells the method that a pass over the data has ended (DWA compares passes)."""
        step: Any = getattr(self.scalarizer, "step", None)
        if step is not None:
            step()

    def memory(self) -> dict[str, Any]:
        """What the method keeps outside its parameters and buffers, such as the losses of passes before (DWA) or an
        optimizer of its own (FAMO); TorchJD's `state_dict` has none of it.
        """
        # A freeze puts a method of its own in the place of `train`.
        kept = {name: value for name, value in kept_outside(self.scalarizer).items() if name != "train"}
        weighting = {} if self.weighting is None else {"weighting": self.weighting.memory()}
        return weighting | {
            name: {"optimizer": type(value).__name__, "state": value.state_dict()}
            if isinstance(value, Optimizer)
            else value
            for name, value in kept.items()
        }

    def load_memory(self, memory: Mapping[str, Any], device: torch.device) -> None:
        """Goes on with what the same method kept elsewhere.

        Args:
            memory: From `memory`.
            device: Where the losses are.

        Raises:
            ValueError: Another method kept it.
        """
        check_same_kept(self.memory(), memory)
        for name, value in memory.items():
            if name == "weighting" and self.weighting is not None:
                self.weighting.load_memory(value)
            elif isinstance(value, Mapping) and "optimizer" in value:
                # It is made at the method's first step; its settings come with its state.
                kind: Any = getattr(torch.optim, value["optimizer"])
                optimizer = kind(list(self.scalarizer.parameters()))
                optimizer.load_state_dict(dict(value["state"]))
                setattr(self.scalarizer, name, optimizer)
            else:
                setattr(self.scalarizer, name, _on(device, value))

    def after_phase(self) -> None:
        """Tells the method that a phase has ended: a pass that it broke off is no part of the next one (DWA)."""
        # TorchJD has no word for it: its `reset` forgets the passes before as well.
        dwa: Any = self.scalarizer
        if getattr(dwa, "_loss_sum", None) is not None:
            dwa._loss_sum, dwa._n_batches = None, 0


def _on(device: torch.device, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return [_on(device, each) for each in value] if isinstance(value, list | tuple) else value
