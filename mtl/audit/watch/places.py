"""Places: every name of every tensor in a module, also where torch itself does not look."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from mtl.audit.watch.objects import Way, follow, kept_in
from mtl.patterns.module_tree import join, named_modules

TensorKind = Literal["param", "buffer", "attr"]


@dataclass(frozen=True)
class Place:
    """One name of one tensor.

    Attributes:
        name: Full name, without the names of wrappers; of rows, with them: `head.weight[0:10]`.
        kind: Parameter, buffer, or plain attribute.
        owner: The module it hangs in.
        key: Its name there.
        module_name: The module's full name.
        hidden: Whether it is kept where torch does not look for parameters, such as in a list or a plain object.
        way: Of such a tensor, the keys that lead to it from the module.
        rows: The only rows that are meant, if not all are.
        is_copy: Whether it is part of an average of the model, of which only the bytes count.
    """

    name: str
    kind: TensorKind
    owner: nn.Module
    key: str
    module_name: str
    hidden: bool = False
    way: Way = ()
    rows: slice | None = None
    is_copy: bool = False

    @property
    def is_held_whole(self) -> bool:
        """Whether flags, gradients and optimizers count as well as bytes; a plain tensor may be anyone's input."""
        return self.rows is None and not self.is_copy and self.kind != "attr"

    @property
    def is_passing(self) -> bool:
        """Whether it is a buffer that no checkpoint holds, as caches are."""
        return self.kind == "buffer" and self.key in self.owner._non_persistent_buffers_set

    @property
    def held(self) -> Mapping[str, Tensor | None]:
        """Where its module has it registered."""
        return self.owner._parameters if self.kind == "param" else self.owner._buffers

    def look(self) -> Tensor | None:
        """The tensor that hangs here now; None if there is none any more."""
        if self.way:
            found = follow(self.owner, self.way)
            return found if isinstance(found, Tensor) else None
        # No `get`: the dictionaries of a TorchScript module have none.
        held, key = self.held, self.key
        return held[key] if key in held else None  # noqa: SIM401


def is_readable(tensor: Tensor) -> bool:
    """Whether a tensor has bytes that can be compared: it is there, and dense or sparse."""
    return not (is_unmade(tensor) or tensor.is_nested or tensor.is_quantized or tensor.is_meta)


def is_unmade(tensor: Tensor) -> bool:
    """Whether a lazy module has yet to make it."""
    return isinstance(tensor, UninitializedParameter | UninitializedBuffer)


def is_sparse(tensor: Tensor) -> bool:
    """Whether a tensor keeps the elements that are not zero only, in any of torch's layouts."""
    return tensor.layout != torch.strided


# A path, the module there, and whether it is hidden from torch.
Module = tuple[str, nn.Module, bool]


@dataclass(frozen=True)
class Inventory:
    """All that hangs in a module tree.

    Attributes:
        modules: Every module by every path.
        places: Every name of every tensor.
    """

    modules: list[Module]
    places: list[Place]


def take_inventory(root: nn.Module, prefix: str = "") -> Inventory:
    """Every module and tensor, also of those in attributes, containers and plain objects.

    What is found there is named as if its holder were a module, `trunk.experts.0`. A tensor that is registered anywhere
    has no further name by a reference to it.
    """
    modules = [(join(prefix, path) if path else prefix, module, False) for path, module in named_modules(root)]
    places = [place for path, module, _ in modules for place in _registered(path, module, hidden=False)]
    known = {id(module) for _, module, _ in modules}
    registered = {id(place.look()) for place in places}
    searched: set[int] = set()
    # What is found on the way is put at the end, and searched in turn.
    for path, module, hidden in modules:
        if id(module) in searched:
            continue
        searched.add(id(module))
        for way, found in kept_in(module, searched):
            name = join(path, ".".join(way))
            if isinstance(found, nn.Module):
                for inner, each in named_modules(found):
                    if id(each) not in known:
                        known.add(id(each))
                        modules.append((join(name, inner) if inner else name, each, True))
                        new = list(_registered(modules[-1][0], each, hidden=True))
                        registered |= {id(place.look()) for place in new}
                        places += new
            # What a forward left behind with its graph, such as an attention map, is a result and not state.
            elif id(found) not in registered and found.grad_fn is None:
                is_lone = len(way) == 1 and not isinstance(found, nn.Parameter)
                kind: TensorKind = "param" if isinstance(found, nn.Parameter) else "attr"
                places.append(Place(name, kind, module, ".".join(way), path, hidden or not is_lone, way))
    return Inventory(modules, [place for place in places if not place.way or id(place.look()) not in registered])


def _registered(path: str, module: nn.Module, hidden: bool) -> Iterator[Place]:
    """The names of what is registered on a module."""
    for key, parameter in module._parameters.items():
        if parameter is not None:
            yield Place(join(path, key), "param", module, key, path, hidden)
    for key, buffer in module._buffers.items():
        if buffer is not None:
            yield Place(join(path, key), "buffer", module, key, path, hidden)
