"""A rotation: of many items, a few are checked in each step, so that a check costs the same for any model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

# Items a step. A tensor that was not touched for a step has left the processor's caches: it costs about a microsecond.
PER_STEP = 32
# In the first steps of a phase all items are checked, however many there are.
AT_FIRST = 3

_Item = TypeVar("_Item")


class Rotation(Generic[_Item]):
    """The order in which items are due; it has no fixed period, which a loop over tasks might share."""

    def __init__(self, items: Sequence[_Item], per_step: int = PER_STEP) -> None:
        self._all = list(items)
        self._parts = [self._all[start : start + per_step] for start in range(0, len(self._all), per_step)]

    def due(self, step: int) -> list[_Item]:
        """The items to check in a step."""
        count = len(self._parts)
        if count < 2 or step <= AT_FIRST:
            return self._all
        return self._parts[(step + step // count) % count]
