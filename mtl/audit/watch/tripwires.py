"""Tripwires: signs of a change of a frozen tensor that need no read of its bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from mtl.audit.watch.frozen_tensor import FrozenTensor
from mtl.audit.watch.rotation import Rotation

# A frozen tensor, the tensor itself, its module's registry, and its key there.
_Row = tuple[FrozenTensor, Tensor, Mapping[str, Tensor | None], str]


class Tripwires:
    """Finds fully frozen tensors that need a closer check."""

    def __init__(self, frozen: Sequence[FrozenTensor]) -> None:
        plain = [(each, each.tensor, each.place.registry, each.place.key) for each in frozen if each.is_plain]
        self._rotation: Rotation[_Row] = Rotation(plain)
        self._others = [each for each in frozen if not each.is_plain]

    def num_due(self, step: int) -> int:
        """How many tensors are checked in a step."""
        return len(self._rotation.due(step)) + len(self._others)

    def tripped(self, step: int) -> Iterator[FrozenTensor]:
        """Tensors that have or require a gradient, were replaced or may be written; and all without cheap signs."""
        # As few calls as possible: this is the audit's cost in every step.
        for frozen, tensor, held, key in self._rotation.due(step):
            if (
                tensor.grad is not None
                or tensor.requires_grad
                or tensor._version != frozen.version
                or tensor.data_ptr() != frozen.address
                or key not in held
                or held[key] is not tensor
            ):
                yield frozen
        yield from self._others
