"""Places: every name of every tensor in a module, also where torch itself does not look."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from mtl.moduletree import join, named_modules

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
        hidden: Whether its module is kept in a Python list or dictionary, where torch does not see it.
        rows: The only rows that are meant, if not all are.
        is_copy: Whether it is part of an average of the model, of which only the bytes count.
    """

    name: str
    kind: TensorKind
    owner: nn.Module
    key: str
    module_name: str
    hidden: bool = False
    rows: slice | None = None
    is_copy: bool = False

    @property
    def is_held_whole(self) -> bool:
        """Whether flags, gradients and optimizers count as well as bytes; a plain tensor may be anyone's input."""
        return self.rows is None and not self.is_copy and self.kind != "attr"

    def look(self) -> Tensor | None:
        """The tensor that hangs here now; None if there is none any more."""
        key = self.key
        # No `get`: the dictionaries of a TorchScript module have none. This is called for every tensor in every step.
        if self.kind == "param" and "." not in key:
            parameters = self.owner._parameters
            return parameters[key] if key in parameters else None  # noqa: SIM401
        if self.kind == "buffer":
            buffers = self.owner._buffers
            return buffers[key] if key in buffers else None  # noqa: SIM401
        found: object = vars(self.owner)
        for step in key.split("."):
            found = _step_into(found, step)
        return found if isinstance(found, Tensor) else None


def _step_into(holder: object, key: str) -> object:
    """What a dictionary or list has under a key in words; None if nothing."""
    if isinstance(holder, dict):
        return next((value for each, value in holder.items() if str(each) == key), None)
    if isinstance(holder, list | tuple):
        return holder[int(key)] if int(key) < len(holder) else None
    return None


def is_readable(tensor: Tensor) -> bool:
    """Whether a tensor has bytes that can be compared: it is there, and dense or sparse."""
    return not (is_unmade(tensor) or tensor.is_nested or tensor.is_quantized or tensor.is_meta)


def is_unmade(tensor: Tensor) -> bool:
    """Whether a lazy module has yet to make it."""
    return isinstance(tensor, UninitializedParameter | UninitializedBuffer)


def is_sparse(tensor: Tensor) -> bool:
    """Whether a tensor keeps the elements that are not zero only, in any of torch's layouts."""
    return tensor.layout != torch.strided


# What Python keeps several things in.
_HOLDERS = (list, tuple, dict)
# A path, the module there, and whether it is hidden from torch.
Module = tuple[str, nn.Module, bool]


def every_module(root: nn.Module, prefix: str = "") -> list[Module]:
    """Every module by every path, and whether it is hidden: (path, module, hidden).

    Modules in Python lists and dictionaries are named as if these were modules, `trunk.experts.0`.
    """
    found = [(join(prefix, path) if path else prefix, module, False) for path, module in named_modules(root)]
    seen = {module for _, module, _ in found}
    # What is found on the way is put at the end, and looked at in turn.
    for path, module, _ in found:
        for key, value in vars(module).items():
            for way, hidden in _inside(key, value) if isinstance(value, _HOLDERS) else ():
                for inner, each in named_modules(hidden) if isinstance(hidden, nn.Module) else ():
                    if each not in seen:
                        seen.add(each)
                        found.append((join(path, join(f"{key}.{way}", inner) if inner else f"{key}.{way}"), each, True))
    return found


def _inside(key: str, value: object) -> Iterator[tuple[str, nn.Module | Tensor]]:
    """Modules and tensors in a list, tuple or dictionary that a module keeps under a key, each with the way to it."""
    # torch's own dictionaries begin with an underscore; what is in them is known.
    return iter(()) if key.startswith("_") else _search(value, 3)


def _search(value: object, depth: int) -> Iterator[tuple[str, nn.Module | Tensor]]:
    if not isinstance(value, _HOLDERS) or not depth:
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(inner, nn.Module | Tensor):
            yield str(key), inner
        else:
            yield from ((f"{key}.{way}", found) for way, found in _search(inner, depth - 1))


def places_in(modules: list[Module]) -> Iterator[Place]:
    """Every name of every tensor; a module reached by two paths gives its tensors twice."""
    for path, module, hidden in modules:
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield Place(join(path, key), "param", module, key, path, hidden)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                yield Place(join(path, key), "buffer", module, key, path, hidden)
        for key, value in vars(module).items():
            # What a forward left behind with its graph, such as an attention map, is a result and not state.
            if isinstance(value, Tensor) and value.grad_fn is None:
                yield Place(join(path, key), "attr", module, key, path, hidden)
            for way, found in _inside(key, value) if isinstance(value, _HOLDERS) else ():
                if isinstance(found, Tensor) and found.grad_fn is None:
                    kind: TensorKind = "param" if isinstance(found, nn.Parameter) else "attr"
                    yield Place(join(path, f"{key}.{way}"), kind, module, f"{key}.{way}", path, True)
