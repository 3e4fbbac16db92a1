"""Single-task baselines of a comparison: the configuration with one task left."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mtl.config import RunConfig

_BY_PATTERN = ("lr", "weight_decay")
# Patterns, as far as they can be read without a model, that freeze the whole trunk or every head.
_WHOLE = {"trunk": ("trunk", "trunk.**", "**"), "heads": ("heads", "heads.*", "heads.**", "**")}


def single_task_overrides(config: RunConfig, task: str) -> list[str]:
    """The overrides that leave one task, whose loss is the only one.

    Patterns that name another task's head are dropped, and so are phases that train none of what is left: those of
    other tasks, and those in which trunk and head are frozen once other heads are gone.

    Args:
        config: Of all tasks.
        task: The one that is left.
    """
    others = [other for other in config.tasks if other != task]
    found = [f"tasks.{other}=null" for other in others]
    # A single loss has no balance; a method that learns a weight would change the learning rate.
    if config.balance.method != "mean":
        found.append("balance=mean")
    content = config.model_dump(mode="json", exclude_unset=True)
    optim = content.get("optim", {})
    outside = {"freeze_always": content.get("freeze_always"), **{f"optim.{key}": optim.get(key) for key in _BY_PATTERN}}
    for name, old in outside.items():
        if (new := _without(old, others)) != old:
            found.append(f"{name}={json.dumps(new) if new or name == 'freeze_always' else 'null'}")
    phases = _phases(content["phases"], task, others)
    if phases != content["phases"]:
        found.append(f"phases={json.dumps(phases)}")
    return found


def _phases(entries: Sequence[Mapping[str, Any]], task: str, others: Collection[str]) -> list[dict[str, Any]]:
    kept: list[dict[str, Any]] = []
    for entry in entries:
        if "repeat" in entry:
            if inner := _phases(entry["phases"], task, others):
                kept.append({**entry, "phases": inner})
        elif task in (entry.get("tasks") or [task]):
            own = {key: value for key, value in entry.items() if key not in ("tasks", "balance")}
            own |= {key: _without(own[key], others) for key in ("freeze", "train", *_BY_PATTERN) if key in own}
            own = {key: value for key, value in own.items() if value != {}}
            if not _trains_nothing(own, task):
                kept.append(own)
    return kept


def _without(value: Any, others: Collection[str]) -> Any:
    """Patterns, or values by pattern, without those that name the head of another task."""
    if isinstance(value, Mapping):
        return {pattern: each for pattern, each in value.items() if not _names_head_of(pattern, others)}
    if isinstance(value, list):
        # How many tensors a pattern matches is known of all heads only.
        texts = [pattern if isinstance(pattern, str) else str(pattern["pattern"]) for pattern in value]
        return [text for text in texts if not _names_head_of(text, others)]
    return value


def _names_head_of(pattern: str, tasks: Collection[str]) -> bool:
    named = re.match(r"!?heads\.([^.\[@*?]+)(?=[.\[@]|$)", pattern)
    return named is not None and named[1] in tasks


def _trains_nothing(phase: Mapping[str, Any], task: str) -> bool:
    if "train" in phase:
        return not phase["train"]
    is_frozen = dict.fromkeys(_WHOLE, False)
    for pattern in phase.get("freeze") or ():
        for part, whole in _WHOLE.items():
            if pattern.removeprefix("!") in (*whole, *([f"heads.{task}"] if part == "heads" else [])):
                is_frozen[part] = not pattern.startswith("!")
            elif pattern.startswith(f"!{part}"):
                is_frozen[part] = False
    return all(is_frozen.values())
