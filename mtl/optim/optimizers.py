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
from mtl.config.own import checked_options, is_own, own_class
from mtl.patterns import NO_TREE, ModuleTree, PatternError, select
from mtl.runtime.console import first_line
from mtl.runtime.plugin import where_it_failed
from mtl.runtime.tensors import is_sharded
from mtl.runtime.text import hint

# They cannot step parameters of all shapes from one backward: LBFGS needs a closure, SparseAdam sparse gradients, Muon
# matrices.
_UNSUPPORTED = ("LBFGS", "SparseAdam", "Muon")


# Torch's optimizers raise them for a user's options.
_OPTION_ERRORS = (TypeError, ValueError, RuntimeError, AssertionError, IndexError, KeyError, AttributeError)


def _errors_of(config: OptimizerConfig) -> tuple[type[Exception], ...]:
    """The errors that are reported as a wrong setting: any, if the optimizer is the user's own class."""
    return (Exception,) if is_own(config.name) else _OPTION_ERRORS


class UncoveredError(ValueError):
    """A table that gives a parameter no value."""


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
        every_name: Names of all parameters; a pattern may match only other ones, such as frozen ones.
        tree: The module tree of the names.
        otherwise: Numbers of parameters that a table need not cover.

    Raises:
        PatternError: A pattern cannot be read or matches no parameter at all.
        UncoveredError: No pattern of the table covers a parameter.
    """
    if not isinstance(value, Mapping):
        return dict.fromkeys(names, value)
    patterns = list(value)
    for index, pattern in enumerate(patterns):
        if pattern.startswith("!"):
            raise PatternError(
                index, f"pattern {pattern!r} starts with !, which cannot undo a number; give another number instead"
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
    """The factor of each trunk parameter's rate: smaller with the distance from the heads.

    Source: BEiT (Bao et al., arXiv 2106.08254), whose code counts the heads as the layer above the last one.

    Args:
        decay: The factor from one depth group to the one below it.
        depths: The number of each parameter's depth group, 0 at the input, by name.
    """
    num_groups = max(depths.values(), default=-1) + 1
    return {name: decay ** (num_groups - depth) for name, depth in depths.items()}


def is_decayed(name: str, parameter: Tensor, excluded: Collection[str]) -> bool:
    """Whether weight decay applies to a parameter; it does not to vectors and scalars (biases, norms).

    Args:
        name: Its full name.
        parameter: The parameter.
        excluded: Names, or shell patterns of names, that the model itself excludes (timm's `no_weight_decay`).
    """
    return parameter.ndim > 1 and not any(fnmatchcase(name, pattern) for pattern in excluded)


def group_parameters(
    parameters: Mapping[str, nn.Parameter], lr_of: Mapping[str, float], decay_of: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Parameter groups, one for each pair of learning rate and weight decay.

    Args:
        parameters: The trainable parameters by name.
        lr_of: The peak learning rate of each.
        decay_of: The weight decay of each; 0 for one that is not in it.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault((lr_of[name], decay_of.get(name, 0.0)), []).append(parameter)
    return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]


def optimizer_names() -> dict[str, str]:
    """The optimizers of torch by their name in a configuration: `adamw` -> `AdamW`."""
    classes = [kind for kind in vars(torch.optim).values() if isinstance(kind, type) and issubclass(kind, Optimizer)]
    names = [kind.__name__ for kind in classes if kind is not Optimizer]
    return {name.lower(): name for name in names if name not in _UNSUPPORTED}


def build_optimizer(config: OptimizerConfig, groups: Sequence[Mapping[str, Any]]) -> Optimizer:
    """An optimizer over exactly these groups.

    Args:
        config: Which one.
        groups: From `group_parameters`; they are not written to.

    Raises:
        SettingError: There is no such optimizer, or it does not take these options or these groups.
    """
    kind = _optimizer_class(config.name)
    takes = inspect.signature(kind).parameters
    _check_supported(config, kind, any(group["weight_decay"] for group in groups))
    options = checked_options(kind, config.options, "optimizer.options")
    if not {"fused", "foreach", "capturable", "differentiable"} & options.keys():
        # One fused kernel if there is one for these devices, else loops over lists of tensors.
        fast = "fused" if "fused" in takes and _can_be_fused(kind, options, groups) else "foreach"
        options |= {fast: True} if fast in takes else {}
    if "lr" in takes:
        options["lr"] = max(group["lr"] for group in groups)
    try:
        # Copies: an optimizer writes the current rate into its groups.
        make: Any = kind
        optimizer: Optimizer = make([dict(group) for group in groups], **options)
    except _errors_of(config) as error:
        known = ", ".join(key for key in takes if key not in ("params", "lr", "weight_decay")) or "none"
        text = _text(error, config)
        raise SettingError("optimizer.options", f"{config.name} takes the options {known}: {text}") from error
    return optimizer


def _check_supported(config: OptimizerConfig, kind: type[Optimizer], decays: bool) -> None:
    """Raises `SettingError` if an optimizer cannot be used in the training loop, or not with these options."""
    takes = inspect.signature(kind).parameters
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise SettingError("optimizer.name", f"{config.name} needs a closure that recomputes the loss; choose another")
    reserved = [key for key in ("params", "lr", "weight_decay") if key in config.options]
    if reserved:
        raise SettingError("optimizer.options", f"{reserved[0]!r} has a key of its own, next to optimizer")
    if config.options.get("differentiable"):
        raise SettingError("optimizer.options", "differentiable is for steps that are differentiated; leave it out")
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
    if "lr" not in takes and not takes_all:
        raise SettingError("optimizer.name", f"{config.name} takes no lr, which every phase and schedule sets")
    if "weight_decay" not in takes and not takes_all and decays:
        raise SettingError("optimizer.name", f"{config.name} takes no weight decay; set weight_decay to 0")
    if config.options.get("fused") and _mixes_momentum(kind, config.options):
        raise SettingError(
            "optimizer.options",
            "torch's fused SGD fails if some parameters have momentum and thawed ones do not; leave out fused",
        )


def _text(error: Exception, config: OptimizerConfig) -> str:
    """An optimizer's error in one line; with the place in the user's code if the class is the user's own."""
    return where_it_failed(error) if is_own(config.name) else first_line(error)


def _can_be_fused(kind: type[Optimizer], options: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether torch has a fused kernel for an optimizer's step on these parameters, thawed ones included."""
    if _mixes_momentum(kind, options):
        return False
    parameters = [parameter for group in groups for parameter in group["params"]]
    # Only Adam's kernels know shards.
    if any(map(is_sharded, parameters)) and not issubclass(kind, torch.optim.Adam | torch.optim.AdamW):
        return False
    if not all(parameter.device.type in ("cpu", "cuda") and parameter.is_floating_point() for parameter in parameters):
        return False
    try:
        kind([nn.Parameter(parameters[0].new_zeros(1))], lr=1.0, fused=True)  # type: ignore[call-arg]
    except _OPTION_ERRORS:
        return False
    return True


def _mixes_momentum(kind: type[Optimizer], options: Mapping[str, Any]) -> bool:
    """Whether torch's fused kernel needs momentum for all parameters or for none.

    It fails if a thawed parameter has none yet; and after an fp16 overflow in the first step it uses momentum that was
    never written.
    """
    return issubclass(kind, torch.optim.SGD) and bool(options.get("momentum"))


def try_out(config: OptimizerConfig, device: torch.device) -> None:
    """Steps one small matrix, since some options fail only in a step.

    Raises:
        SettingError: The optimizer does not step with these options on this device.
    """
    parameter = nn.Parameter(torch.zeros(2, 2, device=device))
    optimizer = build_optimizer(config, [{"params": [parameter], "lr": 0.1, "weight_decay": 0.0}])
    parameter.grad = torch.zeros_like(parameter)
    try:
        optimizer.step()
    except _errors_of(config) as error:
        text = _text(error, config)
        raise SettingError("optimizer.options", f"{config.name} cannot step on {device.type}: {text}") from error


def _optimizer_class(name: str) -> type[Optimizer]:
    if is_own(name):
        return own_class(name, "optimizer.name", Optimizer)
    names = optimizer_names()
    if name.lower() not in names:
        choices = f"there are: {', '.join(sorted(names))}, or your own as package.module:Name"
        raise SettingError("optimizer.name", f"no optimizer {name!r}{hint(name.lower(), names)}; {choices}")
    kind: type[Optimizer] = getattr(torch.optim, names[name.lower()])
    return kind


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """The parameters that an optimizer steps, in its order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
