"""The contract of one phase: the tensors that must not move, each by the place where it hangs in the module tree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from mtl.moduletree import describe, join
from mtl.names import parents
from mtl.patterns import PatternLike, partition, text_of
from mtl.storage import overlapping

TensorKind = Literal["param", "buffer", "attr"]


@dataclass(frozen=True)
class Place:
    """One name of one tensor.

    Attributes:
        name: Full name.
        kind: Parameter, buffer, or plain attribute.
        owner: The module it hangs in.
        key: Its name there.
        hidden: Whether its module is kept in a Python list or dictionary, where torch does not see it.
    """

    name: str
    kind: TensorKind
    owner: nn.Module
    key: str
    hidden: bool = False

    @property
    def module_name(self) -> str:
        return self.name.rpartition(".")[0]

    def look(self) -> Tensor | None:
        """The tensor that hangs here now; None if there is none any more."""
        return self._look_in(self.owner)

    def look_from(self, root: nn.Module) -> Tensor | None:
        """The same by way of the whole path from the root, which sees modules that were swapped since."""
        if self.hidden:
            return self.look()
        try:
            return self._look_in(root.get_submodule(self.module_name))
        except AttributeError:
            return None

    def _look_in(self, owner: nn.Module) -> Tensor | None:
        if self.kind == "param":
            return owner._parameters.get(self.key)
        found = owner._buffers.get(self.key) if self.kind == "buffer" else vars(owner).get(self.key)
        return found if isinstance(found, Tensor) else None


@dataclass(frozen=True)
class Contract:
    """What is frozen in a phase, and what is not.

    Attributes:
        patterns: The patterns it was drawn from.
        frozen: Every name of every frozen tensor.
        free: Every name of every other tensor.
        links: The ways from the root to frozen tensors: (module, name of its child, the child).
    """

    patterns: tuple[str, ...]
    frozen: list[Place]
    free: list[Place]
    links: list[tuple[nn.Module, str, nn.Module]]

    def is_unlinked(self) -> bool:
        """Whether a module on the way to a frozen tensor is no longer the one it was."""
        return any(module._modules.get(key) is not child for module, key, child in self.links)


def draw_contract(model: nn.Module, patterns: Sequence[PatternLike]) -> Contract:
    """Resolves patterns against every tensor of a module: parameters, buffers (persistent or not), plain attributes.

    Modules in Python lists and dictionaries are named as if these were modules, `trunk.experts.0.weight`. What of them
    is frozen is held to the contract; what is not is left alone, since a teacher may be hidden there on purpose.

    Raises:
        PatternError: A pattern cannot be read or selects nothing.
    """
    places = list(_places(model))
    split = partition(
        patterns,
        [place.name for place in places if place.kind == "param"],
        # A plain tensor attribute follows the rule of buffers: frozen by name, or with the parameters beside it.
        [place.name for place in places if place.kind != "param"],
        describe(model),
    )
    names = {*split.frozen, *split.frozen_buffers}
    frozen = [place for place in places if place.name in names]
    return Contract(
        tuple(map(text_of, patterns)),
        frozen,
        [place for place in places if place.name not in names and not place.hidden],
        list(_links(model, [place for place in frozen if not place.hidden])),
    )


def _places(model: nn.Module) -> Iterator[Place]:
    """Every name of every tensor; a module reached by two paths gives its tensors twice."""
    seen = set(model.modules())
    waiting = [(path, module, False) for path, module in model.named_modules(remove_duplicate=False)]
    # What is found on the way is put at the end, and looked at in turn.
    for path, module, hidden in waiting:
        yield from _places_in(path, module, hidden)
        for key, value in vars(module).items():
            # torch's own dictionaries begin with an underscore; what is in them is known.
            for inner, found in _modules_in(value) if not key.startswith("_") else ():
                for name, each in found.named_modules():
                    if each not in seen:
                        seen.add(each)
                        inside = f"{key}.{inner}.{name}" if name else f"{key}.{inner}"
                        waiting.append((join(path, inside), each, True))


def _places_in(path: str, module: nn.Module, hidden: bool) -> Iterator[Place]:
    for key, parameter in module._parameters.items():
        if parameter is not None:
            yield Place(join(path, key), "param", module, key, hidden)
    for key, buffer in module._buffers.items():
        if buffer is not None:
            yield Place(join(path, key), "buffer", module, key, hidden)
    for key, value in vars(module).items():
        # What a forward left behind with its graph, such as an attention map, is a result and not state.
        if isinstance(value, Tensor) and value.grad_fn is None:
            yield Place(join(path, key), "attr", module, key, hidden)


def _modules_in(value: object, depth: int = 3) -> Iterator[tuple[str, nn.Module]]:
    """Modules in a list, tuple or dictionary, and in those inside it, each with the way to it."""
    if not isinstance(value, list | tuple | dict) or not depth:
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(inner, nn.Module):
            yield str(key), inner
        else:
            yield from ((f"{key}.{way}", module) for way, module in _modules_in(inner, depth - 1))


def _links(model: nn.Module, frozen: list[Place]) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    on_the_way = {path for place in frozen for path in parents(place.name)}
    modules = dict(model.named_modules(remove_duplicate=False))
    for path in on_the_way - {""}:
        parent, _, key = path.rpartition(".")
        yield modules[parent], key, modules[path]


def shared_memory(contract: Contract) -> list[tuple[Place, Place]]:
    """Pairs of a frozen and a free place whose tensors have bytes of memory in common."""
    frozen, free = (
        [(place, tensor) for place in places if (tensor := place.look()) is not None]
        for places in (contract.frozen, contract.free)
    )
    pairs = overlapping([tensor for _, tensor in frozen], [tensor for _, tensor in free])
    return [(frozen[one][0], free[other][0]) for one, other in pairs]
