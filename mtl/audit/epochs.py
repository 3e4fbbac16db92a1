"""The freeze of each epoch of a framework's training, as phases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mtl.patterns import Counted, PatternLike, as_list

Patterns = PatternLike | Sequence[PatternLike]
# Patterns for all epochs; by the first epoch that they hold for, counted from 0; or by a function of the epoch.
EpochFreeze = Patterns | Mapping[int, Patterns] | Callable[[int], Patterns]


@dataclass(frozen=True)
class EpochSpan:
    """Consecutive epochs with the same freeze: one phase.

    Attributes:
        name: The phase's name.
        freeze: Patterns of the frozen tensors; none freezes nothing.
    """

    name: str
    freeze: tuple[PatternLike, ...]


class FreezeByEpoch:
    """Maps an epoch to its freeze.

    Attributes:
        spans: All spans that are known before the training; none if the freeze is a function.
        varies: Whether epochs may differ in their freeze.
    """

    def __init__(self, freeze: EpochFreeze, name: str) -> None:
        """Args:
            freeze: The freeze as the callbacks receive it.
            name: The phases' name; `name[0-4]` and `name[5-]` where epochs have different freezes.

        Raises:
            ValueError: It is none of the forms, an epoch is no whole number from 0 on, or epoch 0 has no freeze.
        """
        self.varies = callable(freeze) or isinstance(freeze, Mapping)
        self.spans: list[EpochSpan] = []
        self._firsts = [0]
        self._name = name
        self._function: Callable[[int], Patterns] | None = None
        self._latest: tuple[int, EpochSpan] | None = None
        if isinstance(freeze, Mapping):
            self._firsts = _checked_epochs(freeze)
            ends = [f"{following - 1}" for following in self._firsts[1:]]
            for first, last in zip(self._firsts, [*ends, ""], strict=True):
                epochs = f"{first}" if last == f"{first}" else f"{first}-{last}"
                self.spans.append(EpochSpan(f"{name}[{epochs}]", _checked(freeze[first], f"freeze[{first}]")))
        elif callable(freeze):
            self._function = freeze
        else:
            self.spans.append(EpochSpan(name, _checked(freeze, "freeze")))

    def at(self, epoch: int) -> EpochSpan:
        """The span of an epoch; a function is called once per epoch.

        Raises:
            ValueError: The function did not return patterns.
        """
        if self._function is None:
            return [span for span, first in zip(self.spans, self._firsts, strict=True) if first <= epoch][-1]
        if self._latest is None or self._latest[0] != epoch:
            freeze = _checked(self._function(epoch), f"freeze({epoch})")
            before = None if self._latest is None else self._latest[1]
            same = before is not None and before.freeze == freeze
            # Its last epoch is not known yet.
            self._latest = epoch, before if before and same else EpochSpan(f"{self._name}[{epoch}-]", freeze)
        return self._latest[1]


def _checked_epochs(freeze: Mapping[int, Patterns]) -> list[int]:
    form = "expected freeze by first epoch, such as {0: ['trunk'], 5: []}"
    for epoch in freeze:
        if not isinstance(epoch, int) or isinstance(epoch, bool) or epoch < 0:
            raise ValueError(f"{form}: an epoch is a whole number from 0 on, got {epoch!r}")
    if 0 not in freeze:
        got = f"begins with epoch {min(freeze)}" if freeze else "is empty"
        raise ValueError(f"{form}: epoch 0 needs a freeze as well (0: [] freezes nothing), but it {got}")
    return sorted(freeze)


def _checked(freeze: object, where: str) -> tuple[PatternLike, ...]:
    if isinstance(freeze, str | Counted):
        return tuple(as_list(freeze))
    if not isinstance(freeze, list | tuple) or not all(isinstance(pattern, str | Counted) for pattern in freeze):
        raise ValueError(f"{where}: expected patterns, such as ['trunk', '!trunk.layer4'], got {freeze!r}")
    return tuple(freeze)
