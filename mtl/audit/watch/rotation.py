"""Takes turns: of many things, each is looked at every few steps only, so that a look costs the same for any model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

# So many are looked at in a step; of more, the others in the next steps. What has not been touched for a step is no
# longer in the processor's caches: a look at one costs about a microsecond.
A_LOOK = 32
# In the first steps of a phase all are, however many there are.
AT_FIRST = 3

_Item = TypeVar("_Item")


class Turns(Generic[_Item]):
    """The order in which things are looked at; it meets no period that a loop may have, such as that of its tasks."""

    def __init__(self, items: Sequence[_Item], a_look: int = A_LOOK) -> None:
        self._all = list(items)
        self._parts = [self._all[start : start + a_look] for start in range(0, len(self._all), a_look)]

    def due(self, step: int) -> list[_Item]:
        """What is looked at in a step."""
        count = len(self._parts)
        if count < 2 or step <= AT_FIRST:
            return self._all
        return self._parts[(step + step // count) % count]
