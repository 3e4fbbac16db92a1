"""Describes a torch module in the terms that patterns need: children in order, classes, depth groups."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from mtl.patterns import ModuleTree


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside DataParallel, DistributedDataParallel and torch.compile, whose names are the ones meant."""
    while True:
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif isinstance(inner := module._modules.get("_orig_mod"), nn.Module) and len(module._modules) == 1:
            module = inner
        else:
            return module


def describe(module: nn.Module) -> ModuleTree:
    """The description of a module and all below it; depth groups are worked out only if a pattern asks for them."""
    modules = dict(module.named_modules(remove_duplicate=False))
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
