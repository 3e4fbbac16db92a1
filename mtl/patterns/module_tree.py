"""`ModuleTree` of a torch module: children in order, classes, depth groups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from mtl.patterns import ModuleTree
from mtl.patterns.matching import NORM
from mtl.patterns.norms import is_norm
from mtl.runtime.text import INNER_NAMES, parents

# Wrappers whose inner module is registered as `module`; others use names of their own.
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside wrappers (DDP, FSDP, torch.compile and others), whose names patterns refer to."""
    return list(_layers(module))[-1]


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The module, the module that it wraps if it is a wrapper, and so on inwards."""
    yield module
    children = list(module.named_children())
    if len(children) == 1 and (isinstance(module, _WRAPPERS) or children[0][0] in INNER_NAMES):
        yield from _layers(children[0][1])


def named_modules(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module by every path; a wrapper has the path of the module inside it, and comes before it."""
    for layer in _layers(module):
        yield path, layer
    for key, child in layer._modules.items():
        if child is not None:
            yield from named_modules(child, join(path, key))


def named_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Every name of every parameter, without the names of wrappers."""
    return {
        join(path, key): parameter
        for path, each in named_modules(module)
        for key, parameter in each._parameters.items()
        if parameter is not None
    }


def named_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Every name of every buffer, without the names of wrappers."""
    return {
        join(path, key): buffer
        for path, each in named_modules(module)
        for key, buffer in each._buffers.items()
        if buffer is not None
    }


def describe(module: nn.Module) -> ModuleTree:
    """The tree of a module."""
    return describe_modules(dict(named_modules(module)))


def describe_modules(modules: Mapping[str, nn.Module]) -> ModuleTree:
    """The tree of modules by path; depth groups are computed only if a pattern needs them."""
    return ModuleTree(
        children={path: [name for name, _ in each.named_children()] for path, each in modules.items()},
        classes={path: _class_names(type(each)) for path, each in modules.items()},
        depths=lambda path: {join(path, name): depth for name, depth in depths(modules[path]).items()},
    )


def _class_names(kind: type[nn.Module]) -> list[str]:
    """The names that `type:` takes for modules of a class."""
    return [base.__name__ for base in kind.__mro__] + ([NORM] if is_norm(kind) else [])


def depth_groups(module: nn.Module) -> list[list[str]]:
    """The names of all parameters and buffers of a module in groups from input to output; see `depths`."""
    depth_of = depths(module)
    groups: list[list[str]] = [[] for _ in range(max(depth_of.values(), default=-1) + 1)]
    for name in [*named_parameters(module), *named_buffers(module)] if depth_of else ():
        groups[depth_of[name]].append(name)
    return groups


def depths(module: nn.Module) -> dict[str, int]:
    """The depth group of every tensor and module in a module, for layer-wise rates and gradual unfreezing.

    A timm model defines the groups itself (`group_matcher`): the stem with tokens and position embeddings, then every
    block, then the layers after them. For any other module each child is a group, and of children that only hold blocks
    (lists, sequences) each of theirs; its own bare parameters belong to the first group. A buffer is in the group of
    the parameters next to it. A tensor with several names is in the group of its first name.

    Returns:
        By every name, the number of the group, 0 at the input. A module, whose path also stands for tensors that torch
        does not register, has the first group of its own parameters, else of those below it, else of those around it.
        Empty for a module without parameters.
    """
    parameters, buffers = named_parameters(module), named_buffers(module)
    if not parameters:
        return {}
    first_names: dict[int, str] = {}
    for name, tensor in (parameters | buffers).items():
        first_names.setdefault(id(tensor), name)
    groups = _parameter_groups(unwrap(module), [n for n, p in parameters.items() if first_names[id(p)] == n])
    number = {name: depth for depth, group in enumerate(groups) for name in group}
    depth_of = {name: number[first_names[id(parameter)]] for name, parameter in parameters.items()}
    of_modules = _module_depths([path for path, _ in named_modules(module)], depth_of)
    for name, buffer in buffers.items():
        first = first_names[id(buffer)]
        depth_of[name] = depth_of[first] if first in depth_of else of_modules[first.rpartition(".")[0]]
    return depth_of | of_modules


def _module_depths(paths: Sequence[str], depth_of: Mapping[str, int]) -> dict[str, int]:
    """The depth group of each module; `paths` list a module before its children, and children in order."""
    own: dict[str, int] = {}
    below: dict[str, tuple[int, int]] = {}  # first and last
    for name, depth in depth_of.items():
        own[name.rpartition(".")[0]] = min(depth, own.get(name.rpartition(".")[0], depth))
        for path in parents(name):
            first, last = below.get(path, (depth, depth))
            below[path] = min(first, depth), max(last, depth)
    found: dict[str, int] = {}
    latest: dict[str, int] = {}
    for path in paths:
        around = path.rpartition(".")[0]
        # A module without parameters is in the group of the one before it.
        found[path] = own.get(path, below[path][0]) if path in below else latest[around]
        latest[around] = below[path][1] if path in below else found[path]
        latest[path] = found[path]
    return found


def _parameter_groups(module: nn.Module, names: Sequence[str]) -> list[list[str]]:
    """The names of parameters in groups from input to output."""
    matcher: Any = getattr(module, "group_matcher", None)
    if matcher is not None:
        from timm.models._manipulate import group_with_matcher

        pairs = ((name, None) for name in names)
        return [list(group) for group in group_with_matcher(pairs, matcher(coarse=False)).values()]
    groups: dict[str, list[str]] = {}
    blocks = list(_blocks(module))
    first = next((block for block in blocks if any(name.startswith(f"{block}.") for name in names)), "")
    for name in names:
        block = next((block for block in blocks if name.startswith(f"{block}.")), first)
        groups.setdefault(block, []).append(name)
    return [groups[block] for block in blocks if block in groups] or [list(names)]


def _blocks(module: nn.Module) -> Iterator[str]:
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.Sequential) and len(child):
            yield from (f"{name}.{inner}" for inner, _ in child.named_children())
        else:
            yield name


def join(path: str, name: str) -> str:
    """The full name of a tensor or module registered on the module at a path; both parts may be empty."""
    return f"{path}.{name}" if path and name else path or name
