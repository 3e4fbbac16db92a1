"""A phase's optimizer: rates and decay by parameter, groups, and the optimizer itself."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mtl.config import SettingError
from mtl.config.optim import OptimizerConfig
from mtl.patterns import NO_TREE, ModuleTree, PatternError, select
from mtl.runtime.console import first_line
from mtl.runtime.plugin import PluginError, find_class, where_it_failed
from mtl.runtime.text import hint

# They do not step parameters of all shapes from one backward: LBFGS wants a closure, SparseAdam sparse gradients, Muon
# matrices only.
_NOT_FOR_THIS_LOOP = ("LBFGS", "SparseAdam", "Muon")


# What options of a user's can make an optimizer raise.
_THEIR_ERRORS = (TypeError, ValueError, RuntimeError, AssertionError, IndexError, KeyError, AttributeError)


def _errors_of(config: OptimizerConfig) -> tuple[type[Exception], ...]:
    """What an optimizer can raise for which its user is to be told: anything, if it is the user's own."""
    return (Exception,) if ":" in config.name else _THEIR_ERRORS


class UncoveredError(ValueError):
    """A table that leaves a parameter without a value."""


def by_pattern(
    value: float | Mapping[str, float],
    names: Sequence[str],
    every_name: Sequence[str],
    tree: ModuleTree = NO_TREE,
    otherwise: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """One number for each of some parameters.

    Args:
        value: One number for all, or pattern -> number; the last pattern that matches decides.
        names: Names of the parameters.
        every_name: Names of all parameters; a pattern may match others only, such as frozen ones.
        tree: The module tree that the names hang in.
        otherwise: Numbers of parameters that a table need not name.

    Raises:
        PatternError: A pattern cannot be read or matches no parameter at all.
        UncoveredError: The table leaves a parameter uncovered.
    """
    if not isinstance(value, Mapping):
        return dict.fromkeys(names, value)
    patterns = list(value)
    for index, pattern in enumerate(patterns):
        if pattern.startswith("!"):
            raise PatternError(
                index, f"pattern {pattern!r} takes back, but a number cannot be taken back; give another number"
            )
    decided_by = select(patterns, every_name, tree).decided_by
    table = {name: value[patterns[decided_by[name]]] for name in names if name in decided_by}
    table |= {name: number for name, number in (otherwise or {}).items() if name not in table}
    uncovered = [name for name in names if name not in table]
    if uncovered:
        raise UncoveredError(
            f"no pattern covers {len(uncovered)} trainable parameters, such as {uncovered[0]}; add one for them"
        )
    return {name: table[name] for name in names}


def layer_factors(decay: float, depths: Mapping[str, int]) -> dict[str, float]:
    """By what a rate is multiplied for each parameter of the trunk: the further from the heads, the less.

    Source: BEiT (Bao et al., arXiv 2106.08254), whose code counts the heads as the layer above the last one.

    Args:
        decay: The factor from one depth group to the one below it.
        depths: The number of each parameter's depth group, 0 at the input, by name.
    """
    num_groups = max(depths.values(), default=-1) + 1
    return {name: decay ** (num_groups - depth) for name, depth in depths.items()}


def is_decayed(name: str, parameter: Tensor, excepted: Collection[str]) -> bool:
    """Whether weight decay is for this parameter: vectors and scalars (biases, norms) are not pulled towards zero.

    Args:
        name: Its full name.
        parameter: The parameter.
        excepted: Names, or shell patterns of names, that the model itself excepts (timm's `no_weight_decay`).
    """
    return parameter.ndim > 1 and not any(fnmatchcase(name, pattern) for pattern in excepted)


def group_parameters(
    parameters: Mapping[str, nn.Parameter], lr_of: Mapping[str, float], decay_of: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Parameter groups, one for each pair of learning rate and weight decay.

    Args:
        parameters: What trains, by name.
        lr_of: The peak learning rate of each.
        decay_of: The weight decay of each; 0 for those that are not in it.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault((lr_of[name], decay_of.get(name, 0.0)), []).append(parameter)
    return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]


def optimizer_names() -> dict[str, str]:
    """The optimizers of torch by the name that a configuration writes: `adamw` -> `AdamW`."""
    classes = [kind for kind in vars(torch.optim).values() if isinstance(kind, type) and issubclass(kind, Optimizer)]
    names = [kind.__name__ for kind in classes if kind is not Optimizer]
    return {name.lower(): name for name in names if name not in _NOT_FOR_THIS_LOOP}


def build_optimizer(config: OptimizerConfig, groups: Sequence[Mapping[str, Any]]) -> Optimizer:
    """An optimizer over exactly these groups.

    Args:
        config: Which one.
        groups: From `group_parameters`; they are not written to.

    Raises:
        SettingError: There is no such optimizer, or it does not take these options or these groups.
    """
    kind = _optimizer_class(config.name)
    errors = _errors_of(config)
    takes = inspect.signature(kind).parameters
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise SettingError("optimizer.name", f"{config.name} wants a closure that computes the loss again and again")
    reserved = [key for key in ("params", "lr", "weight_decay") if key in config.options]
    if reserved:
        raise SettingError("optimizer.options", f"{reserved[0]!r} has a key of its own, beside optimizer")
    if config.options.get("differentiable"):
        raise SettingError("optimizer.options", "differentiable is for steps that are differentiated, not for training")
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
    if "lr" not in takes and not takes_all:
        raise SettingError("optimizer.name", f"{config.name} takes no lr, which every phase and schedule sets")
    if "weight_decay" not in takes and not takes_all and any(group["weight_decay"] for group in groups):
        raise SettingError("optimizer.name", f"{config.name} takes no weight decay; set weight_decay to 0")
    options = dict(config.options)
    if options.get("fused") and _mixes_momentum(kind, options):
        raise SettingError(
            "optimizer.options",
            "torch's fused SGD fails where momentum meets what is thawed; leave out fused",
        )
    if not {"fused", "foreach", "capturable", "differentiable"} & options.keys():
        # In one kernel where there is one for these devices, else over lists of tensors.
        fast = "fused" if "fused" in takes and _can_be_fused(kind, options, groups) else "foreach"
        options |= {fast: True} if fast in takes else {}
    if "lr" in takes:
        options["lr"] = max(group["lr"] for group in groups)
    try:
        # Copies: an optimizer writes the current rate into its groups.
        make: Any = kind
        optimizer: Optimizer = make([dict(group) for group in groups], **options)
    except errors as error:
        known = ", ".join(key for key in takes if key not in ("params", "lr", "weight_decay")) or "none"
        said = where_it_failed(error) if ":" in config.name else first_line(error)
        raise SettingError("optimizer.options", f"{config.name} takes the options {known}: {said}") from error
    return optimizer


def _can_be_fused(kind: type[Optimizer], options: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether torch has one kernel for all of an optimizer's step on these parameters, whenever they begin to train."""
    if _mixes_momentum(kind, options):
        return False
    parameters = [parameter for group in groups for parameter in group["params"]]
    if not all(parameter.device.type in ("cpu", "cuda") and parameter.is_floating_point() for parameter in parameters):
        return False
    try:
        kind([nn.Parameter(parameters[0].new_zeros(1))], lr=1.0, fused=True)  # type: ignore[call-arg]
    except _THEIR_ERRORS:
        return False
    return True


def _mixes_momentum(kind: type[Optimizer], options: Mapping[str, Any]) -> bool:
    """Whether torch's kernel would want momentum of all parameters or of none.

    It fails where one is thawed beside one that trains; and if fp16 overflows in the first step, it goes on with
    momentum that was never written.
    """
    return issubclass(kind, torch.optim.SGD) and bool(options.get("momentum"))


def try_out(config: OptimizerConfig, device: torch.device) -> None:
    """Steps one small matrix, since some options fail only then.

    Raises:
        SettingError: The optimizer does not step with these options on this device.
    """
    parameter = nn.Parameter(torch.zeros(2, 2, device=device))
    optimizer = build_optimizer(config, [{"params": [parameter], "lr": 0.1, "weight_decay": 0.0}])
    parameter.grad = torch.zeros_like(parameter)
    try:
        optimizer.step()
    except _errors_of(config) as error:
        said = where_it_failed(error) if ":" in config.name else first_line(error)
        raise SettingError("optimizer.options", f"{config.name} cannot step on {device.type}: {said}") from error


def _optimizer_class(name: str) -> type[Optimizer]:
    if ":" in name:
        try:
            found: type[Optimizer] = find_class(name, Optimizer)
            return found
        except PluginError as error:
            raise SettingError("optimizer.name", str(error)) from error
    names = optimizer_names()
    if name.lower() not in names:
        there = f"there are: {', '.join(sorted(names))}, or your own as package.module:Name"
        raise SettingError("optimizer.name", f"no optimizer {name!r}{hint(name.lower(), names)}; {there}")
    kind: type[Optimizer] = getattr(torch.optim, names[name.lower()])
    return kind


def held_by(optimizer: Optimizer) -> list[nn.Parameter]:
    """The parameters that an optimizer steps, in its order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
