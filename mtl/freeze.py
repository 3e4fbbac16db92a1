"""Freezing: resolves a list of patterns for a module, and enforces the result.

    plan = plan_freeze(model, ["trunk", "!trunk.layer4"])
    enforce(model, plan)  # from here on, until another plan is enforced
    optimizer = torch.optim.AdamW(trainable_parameters(model, plan))

A frozen parameter has `requires_grad=False` and no gradient, and belongs in no optimizer. A module whose tensors are
all frozen is in eval mode, and stays in it through any later `.train()`: BatchNorm statistics do not move and dropout
is off. The same holds for modules that are added to it later, such as an adapter or a converted norm.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from mtl.patterns import Partition, PatternLike, as_list, partition, text_of
from mtl.patterns.module_tree import describe, join, named_buffers, named_modules, named_parameters
from mtl.runtime.tensors import overlapping
from mtl.runtime.text import parents


class FreezeError(ValueError):
    """A freeze that cannot be enforced."""


@dataclass(frozen=True)
class FreezePlan:
    """A freeze, resolved for one module; every name is a full name, aliases included.

    Attributes:
        patterns: The patterns it was resolved from.
        names: Which parameters and buffers are frozen, and which are not.
        held_in_eval: Modules that stay in eval mode.
    """

    patterns: tuple[str, ...]
    names: Partition
    held_in_eval: tuple[str, ...]


def plan_freeze(module: nn.Module, patterns: PatternLike | Sequence[PatternLike]) -> FreezePlan:
    """Resolves patterns against a module, without changing it.

    Args:
        module: Any module; a wrapper (DDP, torch.compile) stands for the module inside it.
        patterns: What to freeze (see `mtl.patterns`); none freezes nothing.

    Raises:
        PatternError: A pattern cannot be read or selects nothing.
        FreezeError: Only some names of a tensor, only one of two tensors that share memory, or only some statistics of
            a norm layer would be frozen.
    """
    patterns = as_list(patterns)
    parameters, buffers = named_parameters(module), named_buffers(module)
    names = partition(patterns, list(parameters), list(buffers), describe(module))
    _check_no_overlap(parameters | buffers, {*names.frozen, *names.frozen_buffers})
    return FreezePlan(tuple(map(text_of, patterns)), names, tuple(_modules_to_hold(module, names)))


def enforce(module: nn.Module, plan: FreezePlan) -> None:
    """Enforces a plan: clears gradients, sets `requires_grad`, holds frozen modules in eval mode permanently.

    Replaces the plan that was enforced before. All other modules are put in train mode. A module that later replaces
    another one gets the mode of its path at the next `.train()` of any module around it.
    """
    modules, parameters = dict(named_modules(module)), named_parameters(module)
    for parameter in parameters.values():
        parameter.grad = None
    for name in plan.names.frozen:
        parameters[name].requires_grad_(False)
    for name in plan.names.trainable:
        parameters[name].requires_grad_(_is_differentiable(parameters[name]))
    for each in module.modules():
        if isinstance(stand_in := each.__dict__.get("train"), _Train):
            stand_in.remove()
    modes = _Modes.of(plan, modules)
    for path in modes.wrapped:
        modes.replace_train(modules[path], path)
    module.train()


@dataclass(frozen=True)
class _Modes:
    """Which modules a plan holds in eval mode, by path, modules that are added later included.

    Attributes:
        known: The modules that the plan was made for.
        held: Those that stay in eval mode.
        fully_frozen: Held modules without a free tensor: modules added to them later stay in eval mode as well.
        wrapped: Held modules and all modules around them, whose `train` is replaced.
    """

    known: frozenset[str]
    held: frozenset[str]
    fully_frozen: frozenset[str]
    wrapped: frozenset[str]

    @classmethod
    def of(cls, plan: FreezePlan, modules: Iterable[str]) -> _Modes:
        held = frozenset(plan.held_in_eval)
        around_free = {path for name in (*plan.names.trainable, *plan.names.free_buffers) for path in parents(name)}
        around_held = {around for path in held for around in parents(path)}
        return cls(frozenset(modules), held, held - around_free, held | around_held)

    def holds(self, path: str) -> bool:
        if path in self.known:
            return path in self.held
        return next((around in self.fully_frozen for around in parents(path) if around in self.known), False)

    def replace_train(self, module: nn.Module, path: str) -> None:
        """Replaces `module.train`, so that the module and modules added to it later keep these modes."""
        # An instance attribute overrides the class's method, for `.train()` of any module around it as well.
        module.__dict__["train"] = _Train(module, path, self)


class _Train:
    """Replaces `module.train`, so that any call of it keeps the modes of a plan.

    It refers to its module, so a copy of the module, by `deepcopy` or pickle, has one of its own.
    """

    def __init__(self, module: nn.Module, path: str, modes: _Modes) -> None:
        self._module = module
        self._path = path
        self._modes = modes
        self._before = module.__dict__.get("train")

    def __call__(self, mode: bool = True) -> nn.Module:
        module, is_held = self._module, self._modes.holds(self._path)
        # The class's own method, which also calls the children's, clears caches in some models.
        train = self._before or partial(type(module).train, module)
        train(mode and not is_held)
        for key, child in module._modules.items():
            path = join(self._path, key)
            if child is None:
                continue
            # A module that was added, or replaced another one, after the plan was enforced.
            is_new = not isinstance(child.__dict__.get("train"), _Train)
            is_new &= path in self._modes.wrapped or self._modes.holds(path)
            if is_new:
                self._modes.replace_train(child, path)
            if is_new or (is_held and mode):
                child.train(mode)
        return module

    def remove(self) -> None:
        """Restores the previous `train`."""
        del self._module.__dict__["train"]
        if self._before is not None:
            self._module.__dict__["train"] = self._before


def free_norm_statistics(module: nn.Module, plan: FreezePlan) -> list[str]:
    """The names of running statistics of norm layers that are not frozen."""
    free = named_buffers(module).keys() - set(plan.names.frozen_buffers)
    norms = [(name, each) for name, each in named_modules(module) if isinstance(each, _NormBase)]
    return [full for name, norm in norms for key in norm._buffers if (full := join(name, key)) in free]


def trainable_parameters(module: nn.Module, plan: FreezePlan) -> dict[str, nn.Parameter]:
    """The trainable parameters by name, each tensor once."""
    trainable = set(plan.names.trainable)
    first_name: dict[nn.Parameter, str] = {}
    for name, parameter in named_parameters(module).items():
        if name in trainable and _is_differentiable(parameter):
            first_name.setdefault(parameter, name)
    return {name: parameter for parameter, name in first_name.items()}


def _is_differentiable(parameter: nn.Parameter) -> bool:
    """Whether a parameter can have a gradient; integer ones cannot, and are never trained."""
    return parameter.is_floating_point() or parameter.is_complex()


def untrainable_parameters(module: nn.Module) -> list[str]:
    """Names of parameters that a new model itself marks as not trainable, such as a fixed position table.

    `enforce` makes all trainable that a plan does not freeze; add these names to the patterns to keep them fixed.
    """
    return [name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad]


def is_frozen(plan: FreezePlan, module_name: str) -> bool:
    """Whether a module has parameters, and every one of them is frozen."""
    start = f"{module_name}."
    return any(name.startswith(start) for name in plan.names.frozen) and not any(
        name.startswith(start) for name in plan.names.trainable
    )


def is_fully_frozen(plan: FreezePlan, module_name: str) -> bool:
    """Whether every parameter and every buffer of a module is frozen."""
    start = f"{module_name}."
    return is_frozen(plan, module_name) and not any(name.startswith(start) for name in plan.names.free_buffers)


def _check_no_overlap(tensors: dict[str, Tensor], frozen: set[str]) -> None:
    """Raises `FreezeError` if a frozen tensor is, or shares memory with, one that is not frozen."""
    inside, outside = ({n: t for n, t in tensors.items() if (n in frozen) == side} for side in (True, False))
    for one, other in overlapping(list(inside.values()), list(outside.values())):
        name, there = list(inside)[one], list(outside)[other]
        if inside[name] is outside[there]:
            others = ", ".join(each for each in outside if outside[each] is inside[name])
            raise FreezeError(
                f"{name} is frozen, but it is the same tensor as {others}, which is not;"
                " freeze all of its names or none"
            )
        raise FreezeError(f"{name} is frozen, but shares memory with {there}, which is not; freeze both or neither")


def _modules_to_hold(module: nn.Module, names: Partition) -> Iterable[str]:
    """Modules below which everything is frozen, and modules that own a frozen buffer, which a forward could change.

    A module with several names is held only if each of its names is.
    """
    num_frozen = Counter(path for name in (*names.frozen, *names.frozen_buffers) for path in parents(name))
    num_free = Counter(path for name in (*names.trainable, *names.free_buffers) for path in parents(name))
    frozen_buffers = set(names.frozen_buffers)
    held: dict[str, bool] = {}
    is_held: dict[nn.Module, bool] = {}
    modules = dict(named_modules(module))
    for path, each in modules.items():
        own_buffers = {join(path, name) for name, buffer in each._buffers.items() if buffer is not None}
        moved = frozen_buffers & own_buffers
        if moved and isinstance(each, _NormBase) and moved != own_buffers:
            raise FreezeError(
                f"{', '.join(sorted(moved))} frozen, but not {', '.join(sorted(own_buffers - moved))}:"
                " a forward updates all statistics of a norm layer; freeze all of them or none"
            )
        # A module without tensors, such as dropout, has the mode of the module around it, which comes before it.
        inherited = path != "" and held[path.rpartition(".")[0]]
        has_tensors = num_frozen[path] or num_free[path]
        held[path] = bool(moved) or (not num_free[path] if has_tensors else inherited)
        is_held[each] = is_held.get(each, True) and held[path]
    return [path for path, each in modules.items() if is_held[each]]
