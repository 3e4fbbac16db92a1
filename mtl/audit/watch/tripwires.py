"""Tripwires: what can be seen of every frozen tensor at once, without reading its bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from mtl.audit.watch.frozen_tensor import Watched
from mtl.audit.watch.rotation import Turns

# A frozen tensor, the tensor itself, the dictionary of its module in which it is registered, and its key there.
_Row = tuple[Watched, Tensor, Mapping[str, Tensor | None], str]


class Tripwires:
    """Tells which of the tensors that are frozen whole have something about them that wants a closer look."""

    def __init__(self, watched: Sequence[Watched]) -> None:
        plain = [(each, each.tensor, each.place.held, each.place.key) for each in watched if each.is_plain]
        self._turns: Turns[_Row] = Turns(plain)
        self._others = [each for each in watched if not each.is_plain]

    def num_looked_at(self, step: int) -> int:
        """How many are looked at in a step."""
        return len(self._turns.due(step)) + len(self._others)

    def tripped(self, step: int) -> Iterator[Watched]:
        """Those that have a gradient, require one, were replaced, or may have been written to; and all odd ones."""
        # As few calls as can be: this is what the audit costs in every step.
        for watched, tensor, held, key in self._turns.due(step):
            if (
                tensor.grad is not None
                or tensor.requires_grad
                or tensor._version != watched.version
                or tensor.data_ptr() != watched.address
                or key not in held
                or held[key] is not tensor
            ):
                yield watched
        yield from self._others
