"""The contract of one phase: the tensors that must not move, each by the place where it hangs in the module tree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mtl.moduletree import describe
from mtl.patterns import PatternLike, partition, text_of

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
    sides = [(side, place) for side, places in enumerate((contract.frozen, contract.free)) for place in places]
    spans = sorted(((*span, side, place) for side, place in sides if (span := _span(place))), key=lambda s: s[:2])
    pairs: list[tuple[Place, Place]] = []
    opened: list[list[tuple[int, Place]]] = [[], []]
    for begin, end, side, place in spans:
        other = opened[1 - side] = [entry for entry in opened[1 - side] if entry[0] > begin]
        pairs += [(place, there) if side == 0 else (there, place) for _, there in other if _overlap(place, there)]
        opened[side].append((end, place))
    return pairs


def _span(place: Place) -> tuple[int, int] | None:
    """The addresses between which a tensor's elements lie; None if it has none."""
    tensor = place.look()
    if tensor is None or tensor.numel() == 0 or tensor.device.type == "meta":
        return None
    extent = 1 + sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + int(extent) * tensor.element_size()


def _overlap(a: Place, b: Place) -> bool:
    """Whether two tensors whose spans meet really share bytes; columns of one matrix do not."""
    first, second = a.look(), b.look()
    if first is None or second is None or first.device != second.device:
        return False
    if first.is_contiguous() and second.is_contiguous():
        return True
    return bool(torch.isin(_addresses(first), _addresses(second)).any())


def _addresses(tensor: Tensor) -> Tensor:
    """The address of every byte of a tensor's elements."""
    offsets = torch.zeros(1, dtype=torch.int64)
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = (offsets[:, None] + torch.arange(length) * stride).flatten()
    size = tensor.element_size()
    return (tensor.data_ptr() + offsets[:, None] * size + torch.arange(size)).flatten()
