"""Writes well-known schedules as ordinary phases: plain data to print, edit and train."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from typing import Any

from mtl.config import RunConfig
from mtl.config.yaml_text import dump_yaml
from mtl.patterns.module_tree import depth_groups
from mtl.phases.setup import build_meta_trunk

PhaseDict = dict[str, Any]


def _gradual(num_groups: int, tasks: Sequence[str], epochs: int) -> list[PhaseDict]:
    """The heads first; then the trunk's depth groups join, from the last to the first (ULMFiT, arXiv 1801.06146)."""
    del tasks
    phases: list[PhaseDict] = [{"name": "heads", "freeze": ["trunk"], "epochs": epochs}]
    phases += [
        {"name": f"last-{num}", "freeze": [f"trunk@first:{num_groups - num}"], "epochs": epochs}
        for num in range(1, num_groups)
    ]
    return [*phases, {"name": "everything", "freeze": [], "epochs": epochs}]


def _top_down(num_groups: int, tasks: Sequence[str], epochs: int) -> list[PhaseDict]:
    """The heads first, then with them one depth group of the trunk at a time, from the last to the first."""
    del tasks
    phases: list[PhaseDict] = [{"name": "heads", "freeze": ["trunk"], "epochs": epochs}]
    for number in range(1, num_groups + 1):
        above = [f"trunk@last:{number - 1}"] if number > 1 else []
        phases.append(
            {"name": f"group-{number}", "freeze": ["trunk", f"!trunk@last:{number}", *above], "epochs": epochs}
        )
    return phases


def _alternate(num_groups: int, tasks: Sequence[str], epochs: int) -> list[PhaseDict]:
    """The heads and the trunk in turn, twice; write another number for more turns."""
    del num_groups, tasks
    heads = {"name": "heads", "freeze": ["trunk"], "epochs": epochs}
    trunk = {"name": "trunk", "freeze": ["heads"], "epochs": epochs}
    return [{"repeat": 2, "phases": [heads, trunk]}]


def _one_at_a_time(num_groups: int, tasks: Sequence[str], epochs: int) -> list[PhaseDict]:
    """Each head in turn, with its own loss alone."""
    del num_groups
    # There is nothing to balance between one loss.
    alone = {"balance": {"method": "mean"}, "epochs": epochs}
    return [{"name": task, "train": [f"heads.{task}"], "tasks": [task], **alone} for task in tasks]


SCHEDULES: dict[str, Callable[[int, Sequence[str], int], list[PhaseDict]]] = {
    "gradual": _gradual,
    "top-down": _top_down,
    "alternate": _alternate,
    "one-at-a-time": _one_at_a_time,
}


def generate_phases(kind: str, num_groups: int, tasks: Sequence[str], epochs: int) -> list[PhaseDict]:
    """The phases of a well-known schedule.

    Args:
        kind: One of `SCHEDULES`.
        num_groups: Depth groups of the trunk.
        tasks: The tasks by name.
        epochs: Length of each phase.
    """
    return SCHEDULES[kind](num_groups, tasks, epochs)


def generate_config(kind: str, config: RunConfig, command: Sequence[str], epochs: int) -> str:
    """A configuration with other phases, as YAML.

    Args:
        kind: One of `SCHEDULES`.
        config: Where everything but the phases is taken from.
        command: The command line that asked for it.
        epochs: Length of each phase.

    Raises:
        ConfigError: The trunk cannot be built.
    """
    num_groups = len(depth_groups(build_meta_trunk(config)))
    written = config.model_dump(mode="json", exclude_unset=True)
    written |= {"name": f"{config.name}-{kind}", "phases": generate_phases(kind, num_groups, [*config.tasks], epochs)}
    what = (SCHEDULES[kind].__doc__ or "").strip()
    return (
        f"# {kind}: {what}\n"
        f"# {config.trunk.name} has {num_groups} depth groups.\n"
        "# Rates are those of `optim`, until a phase sets its own `lr`.\n"
        f"# Written by: {shlex.join(command)}\n" + dump_yaml(written)
    )
