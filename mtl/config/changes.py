"""How a configuration differs from the one that a run began with, and which differences allow a resume."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

# They choose the run and how it is resumed; they are no settings of the training.
_OF_THE_CALL = ("name", "runs_dir", "resume", "resume_override")
# They do not affect the trained weights: locations, logging, how often a checkpoint is written; and what happens to
# steps that are in no checkpoint.
_FREE = (
    *("tracking", "cache.mode", "cache.ram_gb", "cache.disk_gb", "cache.dir", "checkpoint", "distributed"),
    *("data.cache_dir", "data.num_workers", "trunk.checkpointing", "not_finite"),
)
# Weights, labels or the order of images depend on them: a run with other values is another run.
_FIXED = ("seed", "trunk.name", "trunk.options", "data", "tasks")
# Read at the start of a run only.
_AT_BEGIN = ("trunk.weights", "init_from")
# `auto` is resolved at the start of a run, and the choice is kept.
CHOSEN = ("memory_format", "precision", "depthwise")

# `free`: may change at any time; `weighty`: may change with `resume_override`, where it has an effect; `at-begin`: has
# no effect after the start; `fixed`: no run resumes with another value.
Kind = Literal["free", "weighty", "at-begin", "fixed"]

_ABSENT = object()


@dataclass(frozen=True)
class ConfigDifference:
    """One key whose value differs.

    Attributes:
        phase: The name of the phase that the key belongs to; None if it belongs to the run.
        inner: The key, dotted, in the phase or the run.
        before: The value before; None if there was none.
        now: The value now; None if there is none.
        kind: Whether a run can resume with it.
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
        return f"{self.key}: {_or_nothing(self.before)} -> {_or_nothing(self.now)}"


def config_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[ConfigDifference]:
    """Compares two resolved configurations, as plain data without nulls."""
    one, other = dict(_flatten(before)), dict(_flatten(now))
    found = []
    for place in [*one, *(place for place in other if place not in one)]:
        a, b = one.get(place, _ABSENT), other.get(place, _ABSENT)
        phase, inner = place
        if a == b or (phase is None and (inner in _OF_THE_CALL or (inner in CHOSEN and b == "auto"))):
            continue
        old, new = (None if each is _ABSENT else each for each in (a, b))
        found.append(ConfigDifference(phase, inner, old, new, _kind_of_key(phase, inner)))
    return found


def _kind_of_key(phase: str | None, inner: str) -> Kind:
    if phase is not None:
        return "free" if inner == "cache" else "weighty"
    kinds: list[tuple[Kind, tuple[str, ...]]] = [("free", _FREE), ("at-begin", _AT_BEGIN), ("fixed", _FIXED)]
    return next((kind for kind, keys in kinds if _is_below(inner, keys)), "weighty")


def _flatten(value: Any, key: str = "", phase: str | None = None) -> Iterator[tuple[tuple[str | None, str], Any]]:
    """All values of a configuration, each with its phase (None for the run's own) and its key."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _flatten(inner, f"{key}.{name}" if key else str(name), phase)
    elif key == "phases" and phase is None:
        yield (None, "phases (order)"), _order(value)
        for name, settings in _phases(value):
            yield from _flatten(settings, "", name)
    else:
        yield (phase, key), value


def _order(entries: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The names of phases in order; a repeat is a list of its number and its phases."""
    return [[each["repeat"], _order(each["phases"])] if "repeat" in each else each["name"] for each in entries]


def _phases(entries: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for each in entries:
        if "repeat" in each:
            yield from _phases(each["phases"])
        else:
            yield each["name"], {key: value for key, value in each.items() if key != "name"}


def _is_below(key: str, keys: tuple[str, ...]) -> bool:
    return any(key == each or key.startswith(f"{each}.") for each in keys)


def _or_nothing(value: Any) -> str:
    return "nothing" if value is None else str(value)
