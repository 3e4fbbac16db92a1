"""The contract of one phase: the tensors that must not move, each by the place where it hangs in the module tree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from mtl.patterns import partition

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

    def look(self) -> Tensor | None:
        """The tensor that hangs here now; None if there is none any more."""
        if self.kind == "param":
            return self.owner._parameters.get(self.key)
        found = self.owner._buffers.get(self.key) if self.kind == "buffer" else vars(self.owner).get(self.key)
        return found if isinstance(found, Tensor) else None


@dataclass(frozen=True)
class Contract:
    """What is frozen in a phase, and what is not.

    Attributes:
        patterns: The patterns it was drawn from.
        frozen: Every name of every frozen tensor.
        free: Every name of every other tensor.
    """

    patterns: tuple[str, ...]
    frozen: list[Place]
    free: list[Place]


def draw_contract(model: nn.Module, patterns: Sequence[str]) -> Contract:
    """Resolves patterns against every tensor of a module: parameters, buffers (persistent or not) and plain attributes.

    Raises:
        PatternError: A pattern cannot be read or selects nothing.
    """
    places = list(_places(model))
    split = partition(
        patterns,
        [place.name for place in places if place.kind == "param"],
        # A plain tensor attribute follows the rule of buffers: frozen by name, or with the parameters beside it.
        [place.name for place in places if place.kind != "param"],
    )
    names = {*split.frozen, *split.frozen_buffers}
    return Contract(
        tuple(patterns),
        [place for place in places if place.name in names],
        [place for place in places if place.name not in names],
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
            if isinstance(value, Tensor):
                yield Place(start + key, "attr", module, key)


def shared_storage(contract: Contract) -> list[tuple[Place, Place]]:
    """Pairs of a frozen and a free place whose tensors lie in the same bytes of memory."""
    free: dict[int, list[tuple[int, int, Place]]] = {}
    for place in contract.free:
        span = _span(place)
        if span is not None:
            free.setdefault(span[0], []).append((*span[1:], place))
    pairs = []
    for place in contract.frozen:
        span = _span(place)
        if span is None:
            continue
        storage, begin, end = span
        pairs += [(place, other) for first, last, other in free.get(storage, []) if first < end and begin < last]
    return pairs


def _span(place: Place) -> tuple[int, int, int] | None:
    """Address of a tensor's storage, and the bytes in it that the tensor spans; None if it has none."""
    tensor = place.look()
    if tensor is None or tensor.numel() == 0 or tensor.device.type == "meta":
        return None
    size = tensor.element_size()
    begin = int(tensor.storage_offset()) * size
    extent = 1 + sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.untyped_storage().data_ptr(), begin, begin + extent * size
