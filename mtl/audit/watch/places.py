"""Every name of every tensor in a module, including tensors that are not registered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from mtl.audit.watch.unregistered import KeyPath, unregistered_in, value_at
from mtl.patterns.module_tree import join, named_modules

TensorKind = Literal["param", "buffer", "attr"]


@dataclass(frozen=True)
class TensorPlace:
    """One name of one tensor.

    Attributes:
        name: Full name, without the names of wrappers; of rows, with them: `head.weight[0:10]`.
        kind: Parameter, buffer, or plain attribute.
        owner: The module that has it.
        key: Its name in the module.
        module_name: The module's full name.
        is_hidden: Whether it is not registered, such as in a list or a plain object.
        key_path: Of an unregistered tensor, the keys from the module to it.
        rows: The rows, if not all of them are meant.
        is_copy: Whether it belongs to an average of the model, of which only the bytes are checked.
    """

    name: str
    kind: TensorKind
    owner: nn.Module
    key: str
    module_name: str
    is_hidden: bool = False
    key_path: KeyPath = ()
    rows: slice | None = None
    is_copy: bool = False

    @property
    def is_full(self) -> bool:
        """Whether flags, gradients and optimizers are checked as well as bytes: not of rows, copies and attributes."""
        return self.rows is None and not self.is_copy and self.kind != "attr"

    @property
    def is_non_persistent(self) -> bool:
        """Whether it is a buffer that checkpoints omit, such as a cache."""
        return self.kind == "buffer" and self.key in self.owner._non_persistent_buffers_set

    @property
    def registry(self) -> Mapping[str, Tensor | None]:
        """The dictionary of its module in which it is registered."""
        return self.owner._parameters if self.kind == "param" else self.owner._buffers

    def current(self) -> Tensor | None:
        """The tensor that is here now; None if there is none any more."""
        if self.key_path:
            found = value_at(self.owner, self.key_path)
            return found if isinstance(found, Tensor) else None
        # No `get`: the dictionaries of a TorchScript module have none.
        held, key = self.registry, self.key
        return held[key] if key in held else None  # noqa: SIM401


def is_readable(tensor: Tensor) -> bool:
    """Whether a tensor has bytes that can be compared: not uninitialized, nested, quantised or meta."""
    return not (is_uninitialized(tensor) or tensor.is_nested or tensor.is_quantized or tensor.is_meta)


def is_uninitialized(tensor: Tensor) -> bool:
    """Whether a lazy module has not created it yet."""
    return isinstance(tensor, UninitializedParameter | UninitializedBuffer)


def is_sparse(tensor: Tensor) -> bool:
    """Whether a tensor is in one of torch's sparse layouts."""
    return tensor.layout != torch.strided


# A path, the module there, and whether it is not registered.
ModuleEntry = tuple[str, nn.Module, bool]


@dataclass(frozen=True)
class Inventory:
    """All modules and tensors of a module tree.

    Attributes:
        modules: Every module by every path.
        places: Every name of every tensor.
    """

    modules: list[ModuleEntry]
    places: list[TensorPlace]


def build_inventory(root: nn.Module, prefix: str = "") -> Inventory:
    """Lists every module and tensor, including those in attributes, containers and plain objects.

    These are named as if the container were a module, `trunk.experts.0`. A registered tensor has no further name by a
    reference to it.
    """
    modules = [(join(prefix, path) if path else prefix, module, False) for path, module in named_modules(root)]
    places = [place for path, module, _ in modules for place in _registered(path, module, is_hidden=False)]
    known = {id(module) for _, module, _ in modules}
    registered = {id(place.current()) for place in places}
    searched: set[int] = set()
    # Modules that are found are appended, and searched in turn.
    for path, module, is_hidden in modules:
        if id(module) in searched:
            continue
        searched.add(id(module))
        for key_path, found in unregistered_in(module, searched):
            name = join(path, ".".join(key_path))
            if isinstance(found, nn.Module):
                for inner, each in named_modules(found):
                    if id(each) not in known:
                        known.add(id(each))
                        modules.append((join(name, inner) if inner else name, each, True))
                        new = list(_registered(modules[-1][0], each, is_hidden=True))
                        registered |= {id(place.current()) for place in new}
                        places += new
            # A tensor with a graph, such as an attention map, is a result of a forward and not state.
            elif id(found) not in registered and found.grad_fn is None:
                is_lone = len(key_path) == 1 and not isinstance(found, nn.Parameter)
                kind: TensorKind = "param" if isinstance(found, nn.Parameter) else "attr"
                places.append(
                    TensorPlace(name, kind, module, ".".join(key_path), path, is_hidden or not is_lone, key_path)
                )
    return Inventory(
        modules, [place for place in places if not place.key_path or id(place.current()) not in registered]
    )


def _registered(path: str, module: nn.Module, is_hidden: bool) -> Iterator[TensorPlace]:
    """The places of a module's registered parameters and buffers."""
    for key, parameter in module._parameters.items():
        if parameter is not None:
            yield TensorPlace(join(path, key), "param", module, key, path, is_hidden)
    for key, buffer in module._buffers.items():
        if buffer is not None:
            yield TensorPlace(join(path, key), "buffer", module, key, path, is_hidden)
