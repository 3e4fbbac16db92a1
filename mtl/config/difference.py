"""How a configuration differs from the one that a run began with, and which differences a run can go on with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# What changes neither what is trained nor how: where things lie, what is logged, how often it is saved; and what
# becomes of steps that no checkpoint has seen.
_OF_NO_WEIGHT = (
    *("name", "runs_dir", "resume", "resume_override", "tracking", "cache", "checkpoint", "distributed"),
    *("data.cache_dir", "data.num_workers", "trunk.checkpointing", "not_finite"),
)
# What weights, labels or the order of images hang on: a run with other ones is another run.
_FIXED = ("seed", "trunk.name", "trunk.options", "data", "tasks")
# Layout and types are found out when a run begins, and stay what they were.
CHOSEN = ("memory_format", "precision")

_ABSENT = object()


@dataclass(frozen=True)
class Difference:
    """One key with another value than at the run's begin.

    Attributes:
        key: The key, dotted; phases by name.
        before: The value that the run began with; None if it had none.
        now: The value now; None if there is none.
        is_fixed: Whether no run can go on with another value.
    """

    key: str
    before: Any
    now: Any
    is_fixed: bool

    def __str__(self) -> str:
        return f"{self.key}: {_said(self.before)} -> {_said(self.now)}"


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """Compares two resolved configurations, as plain data without nulls; what changes no result is left out."""
    one, other = dict(_flat(before)), dict(_flat(now))
    found = []
    for key in [*one, *(key for key in other if key not in one)]:
        a, b = one.get(key, _ABSENT), other.get(key, _ABSENT)
        if a == b or _is_below(key, _OF_NO_WEIGHT) or (key in CHOSEN and b == "auto"):
            continue
        found.append(Difference(key, None if a is _ABSENT else a, None if b is _ABSENT else b, _is_below(key, _FIXED)))
    return found


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and value and all(isinstance(each, Mapping) and "name" in each for each in value):
        yield f"{key} (order)", [each["name"] for each in value]
        for each in value:
            yield from _flat({k: v for k, v in each.items() if k != "name"}, f"{key}.{each['name']}")
    else:
        yield key, value


def _is_below(key: str, keys: tuple[str, ...]) -> bool:
    return any(key == each or key.startswith(f"{each}.") for each in keys)


def _said(value: Any) -> str:
    return "nothing" if value is None else str(value)
