"""Describes a torch module in the terms that patterns need: children in order, classes, depth groups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from mtl.names import INNER_NAMES
from mtl.patterns import ModuleTree

# Wrappers whose inner module hangs in them as `module`; others have names of their own for it.
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside wrappers (DDP, FSDP, torch.compile and the like), whose names are the ones meant."""
    return list(_layers(module))[-1]


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """A wrapper, what is inside it, and so on."""
    yield module
    children = list(module.named_children())
    if len(children) == 1 and (isinstance(module, _WRAPPERS) or children[0][0] in INNER_NAMES):
        yield from _layers(children[0][1])


def named_modules(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module by every path; a wrapper has the path of what is inside it, and comes before it."""
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
    """The description of a module and all below it."""
    return describe_modules(dict(named_modules(module)))


def describe_modules(modules: Mapping[str, nn.Module]) -> ModuleTree:
    """The description of modules by path; depth groups are worked out only if a pattern asks for them."""
    return ModuleTree(
        children={path: [name for name, _ in each.named_children()] for path, each in modules.items()},
        classes={path: [base.__name__ for base in type(each).__mro__] for path, each in modules.items()},
        depth_groups=lambda path: [[join(path, name) for name in group] for group in depth_groups(modules[path])],
    )


def depth_groups(module: nn.Module) -> list[list[str]]:
    """The parameters of a module in groups from input to output, as layer-wise rates and gradual unfreezing take them.

    For a timm model the groups are its own (`group_matcher`): the stem with tokens and position embeddings, then every
    block, then what follows. Any other module is cut at its children, and those that only hold blocks (lists,
    sequences) at theirs; its own bare parameters belong to the first group.
    """
    names = [name for name, _ in module.named_parameters()]
    if not names:
        return []
    matcher: Any = getattr(module, "group_matcher", None)
    if matcher is not None:
        from timm.models import group_parameters

        return [list(group) for group in group_parameters(module, matcher(coarse=False)).values()]
    groups: dict[str, list[str]] = {}
    blocks = list(_blocks(module))
    first = next((block for block in blocks if any(name.startswith(f"{block}.") for name in names)), "")
    for name in names:
        block = next((block for block in blocks if name.startswith(f"{block}.")), first)
        groups.setdefault(block, []).append(name)
    return [groups[block] for block in blocks if block in groups] or [names]


def _blocks(module: nn.Module) -> Iterator[str]:
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.Sequential) and len(child):
            yield from (f"{name}.{inner}" for inner, _ in child.named_children())
        else:
            yield name


def join(path: str, name: str) -> str:
    """The full name of what hangs in the module at a path; the root's path is ""."""
    return f"{path}.{name}" if path else name
