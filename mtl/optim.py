"""The optimizer of a phase, and the course of its learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mtl.config import OptimConfig
from mtl.patterns import NO_TREE, ModuleTree, PatternError, select

# One-cycle (Smith and Topin, arXiv 1708.07120): from a 25th of the peak up, then down to nothing, in cosine halves.
_WARM_UP_SHARE, _START_FACTOR = 0.3, 0.04


class LearningRateError(ValueError):
    """A table of learning rates that leaves a trainable parameter without one."""


def rates(
    lr: float | Mapping[str, float],
    trainable: list[str],
    every_name: list[str],
    balance_lr: float,
    tree: ModuleTree = NO_TREE,
) -> dict[str, float]:
    """The peak learning rate of every trainable parameter.

    Args:
        lr: One rate for all, or pattern -> rate; the last pattern that matches decides.
        trainable: Names of the parameters that train.
        every_name: Names of all parameters; a pattern may match frozen ones only.
        balance_lr: Rate of the balancing method's own parameters where a table does not name them.
        tree: The module tree that the names hang in.

    Raises:
        PatternError: A pattern cannot be read or matches no parameter at all.
        LearningRateError: The table leaves a trainable parameter uncovered.
    """
    if not isinstance(lr, Mapping):
        return dict.fromkeys(trainable, lr)
    patterns = list(lr)
    for index, pattern in enumerate(patterns):
        if pattern.startswith("!"):
            raise PatternError(
                index, f"pattern {pattern!r} takes back, but a rate cannot be taken back; give another rate"
            )
    decided_by = select(patterns, every_name, tree).decided_by
    table = {name: lr[patterns[decided_by[name]]] for name in trainable if name in decided_by}
    table |= {name: balance_lr for name in trainable if name not in table and name.startswith("balance.")}
    uncovered = [name for name in trainable if name not in table]
    if uncovered:
        raise LearningRateError(
            f"no pattern covers {len(uncovered)} trainable parameters, such as {uncovered[0]}; add one for them"
        )
    return table


def group_parameters(
    config: OptimConfig, parameters: Mapping[str, nn.Parameter], lr_of: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Parameter groups, one for each pair of learning rate and weight decay.

    Vectors and scalars (biases, norms, balancing weights) are not decayed: zero is not where they should be pulled.

    Args:
        config: The weight decay.
        parameters: What trains, by name.
        lr_of: The peak learning rate of each.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((lr_of[name], decay), []).append(parameter)
    return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]


def build_optimizer(groups: list[dict[str, Any]], previous: Optimizer | None = None) -> Optimizer:
    """AdamW over exactly these groups.

    Args:
        groups: From `group_parameters`.
        previous: The optimizer of the phase before; moments of parameters that go on training are taken over.
    """
    # Copies: an optimizer writes the current rate into its groups.
    optimizer = AdamW([dict(group) for group in groups], foreach=True)
    carried = {} if previous is None else previous.state
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter in carried:
                optimizer.state[parameter] = carried[parameter]
    return optimizer


def build_lr_schedule(config: OptimConfig, optimizer: Optimizer, num_steps: int) -> LambdaLR:
    """The learning rate's course over one phase; call its `step` after each of the optimizer's."""
    return LambdaLR(optimizer, partial(_FACTORS[config.lr_schedule], num_steps=num_steps))


def _constant(step: int, num_steps: int) -> float:  # noqa: ARG001 - one signature for all
    return 1.0


def _cosine(step: int, num_steps: int) -> float:
    return _half_cosine(1.0, 0.0, step / num_steps)


def _one_cycle(step: int, num_steps: int) -> float:
    peak = max(1, round(_WARM_UP_SHARE * num_steps))
    if step < peak:
        return _half_cosine(_START_FACTOR, 1.0, step / peak)
    return _half_cosine(1.0, 0.0, (step - peak) / max(1, num_steps - peak))


def _half_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, share))) / 2


_FACTORS: dict[str, Callable[..., float]] = {"constant": _constant, "cosine": _cosine, "one-cycle": _one_cycle}
