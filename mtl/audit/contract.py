"""The contract of one phase: the tensors that must not move, each by the place where it hangs in the module tree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from mtl.moduletree import describe
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
    """

    name: str
    kind: TensorKind
    owner: nn.Module
    key: str

    @property
    def module_name(self) -> str:
        return self.name.rpartition(".")[0]

    def look(self) -> Tensor | None:
        """The tensor that hangs here now; None if there is none any more."""
        return self._look_in(self.owner)

    def look_from(self, root: nn.Module) -> Tensor | None:
        """The same by way of the whole path from the root, which sees modules that were swapped since."""
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
        [place for place in places if place.name not in names],
        list(_links(model, frozen)),
    )


def _places(model: nn.Module) -> Iterator[Place]:
    """Every name of every tensor; a module reached by two paths gives its tensors twice."""
    for path, module in model.named_modules(remove_duplicate=False):
        start = f"{path}." if path else ""
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield Place(start + key, "param", module, key)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                yield Place(start + key, "buffer", module, key)
        for key, value in vars(module).items():
            # What a forward left behind with its graph, such as an attention map, is a result and not state.
            if isinstance(value, Tensor) and value.grad_fn is None:
                yield Place(start + key, "attr", module, key)


def _links(model: nn.Module, frozen: list[Place]) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    on_the_way = {""}
    for place in frozen:
        path = place.module_name
        while path not in on_the_way:
            on_the_way.add(path)
            path = path.rpartition(".")[0]
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
