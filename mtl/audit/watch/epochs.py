"""What is frozen in which epochs of a framework's training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mtl.patterns import Counted, PatternLike, as_list

Patterns = PatternLike | Sequence[PatternLike]
# Patterns for all epochs; by the first epoch, counted from 0, that they are for; or by a function of the epoch.
EpochFreeze = Patterns | Mapping[int, Patterns] | Callable[[int], Patterns]


@dataclass(frozen=True)
class Span:
    """Epochs in a row with one freeze.

    Attributes:
        name: Of the phase that they are.
        freeze: Patterns of what is frozen in them; none freezes nothing.
    """

    name: str
    freeze: tuple[PatternLike, ...]


class FreezeByEpoch:
    """Says which freeze an epoch has.

    Attributes:
        spans: All freezes there are, as far as they are known beforehand.
        varies: Whether one epoch may have another freeze than the next.
    """

    def __init__(self, freeze: EpochFreeze, name: str) -> None:
        """Args:
            freeze: What the callbacks were given.
            name: What phases are called; `name[0-4]` and `name[5-]` where epochs have different freezes.

        Raises:
            ValueError: It is none of the forms, an epoch is no whole number from 0 on, or epoch 0 has no freeze.
        """
        self.varies = callable(freeze) or isinstance(freeze, Mapping)
        self.spans: list[Span] = []
        self._firsts = [0]
        self._name = name
        self._ask: Callable[[int], Patterns] | None = None
        self._answer: tuple[int, Span] | None = None
        if isinstance(freeze, Mapping):
            self._firsts = _checked_epochs(freeze)
            ends = [f"{following - 1}" for following in self._firsts[1:]]
            for first, last in zip(self._firsts, [*ends, ""], strict=True):
                epochs = f"{first}" if last == f"{first}" else f"{first}-{last}"
                self.spans.append(Span(f"{name}[{epochs}]", _checked(freeze[first], f"freeze[{first}]")))
        elif callable(freeze):
            self._ask = freeze
        else:
            self.spans.append(Span(name, _checked(freeze, "freeze")))

    def at(self, epoch: int) -> Span:
        """The span of an epoch; a function is asked once for each epoch that comes up.

        Raises:
            ValueError: The function did not return patterns.
        """
        if self._ask is None:
            return [span for span, first in zip(self.spans, self._firsts, strict=True) if first <= epoch][-1]
        if self._answer is None or self._answer[0] != epoch:
            freeze = _checked(self._ask(epoch), f"freeze({epoch})")
            before = None if self._answer is None else self._answer[1]
            # Where it ends is not known yet.
            same = before is not None and before.freeze == freeze
            self._answer = epoch, before if before and same else Span(f"{self._name}[{epoch}-]", freeze)
        return self._answer[1]


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
