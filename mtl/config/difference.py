"""How a configuration differs from the one that a run began with, and which differences a run can go on with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

# They choose the run and how it is resumed; they are no settings of it.
_OF_THE_CALL = ("name", "runs_dir", "resume", "resume_override")
# What changes neither what is trained nor how: where things lie, what is logged, how often it is saved; and what
# becomes of steps that no checkpoint has seen.
_FREE = (
    *("tracking", "cache.mode", "cache.ram_gb", "cache.disk_gb", "cache.dir", "checkpoint", "distributed"),
    *("data.cache_dir", "data.num_workers", "trunk.checkpointing", "not_finite"),
)
# What weights, labels or the order of images hang on: a run with other ones is another run.
_FIXED = ("seed", "trunk.name", "trunk.options", "data", "tasks")
# What is read when a run begins, and never again.
_AT_BEGIN = ("trunk.weights",)
# Layout and types are found out when a run begins, and stay what they were.
CHOSEN = ("memory_format", "precision")

# `free`: may change at any time; `weighty`: may change if that is asked for, and where it has an effect; `at-begin`:
# has no effect any more; `fixed`: no run resumes with another value.
Kind = Literal["free", "weighty", "at-begin", "fixed"]

_ABSENT = object()


@dataclass(frozen=True)
class Difference:
    """One key with another value than before.

    Attributes:
        phase: The phase that it is of, by the name that was written; None if it is of the run.
        inner: The key, dotted, in the phase or the run.
        before: The value before; None if there was none.
        now: The value now; None if there is none.
        kind: What may become of it.
    """

    phase: str | None
    inner: str
    before: Any
    now: Any
    kind: Kind

    @property
    def key(self) -> str:
        """The key as it is written on the command line."""
        return self.inner if self.phase is None else f"phases.{self.phase}.{self.inner}"

    def __str__(self) -> str:
        return f"{self.key}: {_said(self.before)} -> {_said(self.now)}"


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """Compares two resolved configurations, as plain data without nulls."""
    one, other = dict(_flat(before)), dict(_flat(now))
    found = []
    for place in [*one, *(place for place in other if place not in one)]:
        a, b = one.get(place, _ABSENT), other.get(place, _ABSENT)
        phase, inner = place
        if a == b or (phase is None and (inner in _OF_THE_CALL or (inner in CHOSEN and b == "auto"))):
            continue
        old, new = (None if each is _ABSENT else each for each in (a, b))
        found.append(Difference(phase, inner, old, new, _kind(phase, inner)))
    return found


def _kind(phase: str | None, inner: str) -> Kind:
    if phase is not None:
        return "free" if inner == "cache" else "weighty"
    kinds: list[tuple[Kind, tuple[str, ...]]] = [("free", _FREE), ("at-begin", _AT_BEGIN), ("fixed", _FIXED)]
    return next((kind for kind, keys in kinds if _is_below(inner, keys)), "weighty")


def _flat(value: Any, key: str = "", phase: str | None = None) -> Iterator[tuple[tuple[str | None, str], Any]]:
    """All values of a configuration, each with its phase, if it is of one, and its key."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name), phase)
    elif key == "phases" and phase is None:
        yield (None, "phases (order)"), _order(value)
        for name, settings in _phases(value):
            yield from _flat(settings, "", name)
    else:
        yield (phase, key), value


def _order(entries: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The names of phases, those of a repeat in a list with its number."""
    return [[each["repeat"], _order(each["phases"])] if "repeat" in each else each["name"] for each in entries]


def _phases(entries: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for each in entries:
        if "repeat" in each:
            yield from _phases(each["phases"])
        else:
            yield each["name"], {key: value for key, value in each.items() if key != "name"}


def _is_below(key: str, keys: tuple[str, ...]) -> bool:
    return any(key == each or key.startswith(f"{each}.") for each in keys)


def _said(value: Any) -> str:
    return "nothing" if value is None else str(value)
