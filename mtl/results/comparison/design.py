"""What a comparison trains: each configuration with every value of a grid and every seed, and single-task baselines."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from mtl.config import RunConfig, load_config

SINGLE_TASK = "single-task"
# Where a run is, and how it is shown: not what it computes.
_OF_THE_CALL = ("name", "runs_dir", "resume", "tracking", "seed")


class DesignError(ValueError):
    """A comparison that cannot be made as it is asked for."""


@dataclass(frozen=True)
class Job:
    """A run of a comparison.

    Attributes:
        name: The run's name, and its directory's.
        method: The configuration that it belongs to: the file's name without suffix, or `single-task`.
        setting: The values of the grid, as `key=value`.
        seed: The run's seed.
        file: The configuration.
        overrides: What it is trained with.
        task: The task of a single-task baseline.
    """

    name: str
    method: str
    setting: tuple[str, ...]
    seed: int
    file: Path
    overrides: tuple[str, ...]
    task: str | None = None


@dataclass(frozen=True)
class Design:
    """A comparison.

    Attributes:
        jobs: Its runs, in order.
        methods: The configurations, in order; the first is what others are compared to.
        num_settings: How many values of the grid each is tuned over.
        digest: Of all that decides what the runs compute: a comparison resumes only as what it was.
        run_keys: By run, the overrides besides those of its job: where it is, and how it is shown.
    """

    jobs: tuple[Job, ...]
    methods: tuple[str, ...]
    num_settings: int
    digest: str
    run_keys: dict[str, tuple[str, ...]] = field(default_factory=dict)


def design(
    files: Sequence[Path],
    overrides: Sequence[str],
    num_seeds: int,
    grid: Sequence[str] = (),
    with_single_task: bool = False,
    folder: Path = Path(),
) -> Design:
    """Makes the runs of a comparison, and checks each of their configurations.

    Args:
        files: The configurations.
        overrides: `key=value` pairs for all of them.
        num_seeds: Seeds from 0 on, for each.
        grid: `key=a,b,...` each; every combination of values is trained, the same for every configuration.
        with_single_task: Whether each task of the first configuration is trained by itself as well.
        folder: Where the runs will be.

    Raises:
        DesignError: Two configurations have one name, a part of the grid cannot be read, or the configurations do not
            have the same tasks.
        ConfigError: A configuration is wrong.
    """
    if num_seeds < 1:
        raise DesignError(f"--seeds: expected 1 or more, got {num_seeds}")
    methods = [file.stem for file in files]
    if twice := [name for name in methods if methods.count(name) > 1 or name == SINGLE_TASK]:
        raise DesignError(f"{twice[0]}: two configurations have this name; expected names that differ")
    settings = [tuple(each) for each in product(*map(_values, grid))]
    jobs, run_keys, contents = list[Job](), dict[str, tuple[str, ...]](), list[Any]()
    first: RunConfig | None = None
    for file, method in zip(files, methods, strict=True):
        for setting in settings:
            config = load_config(file, [*overrides, *setting])
            if first is not None and config.tasks.keys() != first.tasks.keys():
                expected, got = ", ".join(first.tasks), ", ".join(config.tasks)
                raise DesignError(f"{file}: expected the tasks of {files[0]}, {expected}; got {got}")
            first = first or config
            contents.append([method, setting, _content(config)])
            for seed in range(num_seeds):
                name = "-".join([method, *(_short(each) for each in setting), f"seed{seed}"])
                jobs.append(Job(name, method, setting, seed, file, (*overrides, *setting)))
                run_keys[name] = _run_keys(config, folder)
    assert first is not None
    if with_single_task:
        for task in first.tasks:
            own = (*overrides, *_single_task(first, task))
            config = load_config(files[0], own)
            contents.append([SINGLE_TASK, task, _content(config)])
            for seed in range(num_seeds):
                name = f"{SINGLE_TASK}-{_safe(task)}-seed{seed}"
                jobs.append(Job(name, SINGLE_TASK, (), seed, files[0], own, task))
                run_keys[name] = _run_keys(config, folder)
    if len({job.name for job in jobs}) < len(jobs):
        raise DesignError("--grid: two settings would have one name; expected values that differ in letters and digits")
    digest = hashlib.sha256(json.dumps([contents, num_seeds], sort_keys=True).encode()).hexdigest()[:16]
    return Design(tuple(jobs), tuple(methods), len(settings), digest, run_keys)


def _values(text: str) -> list[str]:
    """`key=a,b` as `key=a` and `key=b`."""
    key, equals, values = text.partition("=")
    found = [each.strip() for each in values.split(",")]
    if not key or not equals or not all(found):
        raise DesignError(f"--grid: expected key=value,value, such as optim.lr_scale=0.5,1; got {text!r}")
    if len({*found}) < len(found):
        raise DesignError(f"--grid: {key}: expected values that differ, got {values}")
    return [f"{key}={each}" for each in found]


def _single_task(config: RunConfig, task: str) -> list[str]:
    """The overrides that leave one task, whose loss is the only one."""
    found = [f"tasks.{other}=null" for other in config.tasks if other != task]
    # A single loss has no balance; a method that learns a weight would change the learning rate.
    if config.balance.method != "mean":
        found.append("balance=mean")
    for written in config.written_phases:
        for key in ("balance", "tasks"):
            place = f"phases.{written.config.name}.{key}=null"
            if getattr(written.config, key) is not None and place not in found:
                found.append(place)
    return found


def _run_keys(config: RunConfig, folder: Path) -> tuple[str, ...]:
    own = [f"runs_dir={folder / 'runs'}", "resume=auto"]
    if not config.tracking.is_off and config.tracking.backend == "wandb" and config.tracking.group is None:
        own.append(f"tracking.group={folder.resolve().name}")
    return tuple(own)


def _content(config: RunConfig) -> dict[str, Any]:
    content = config.model_dump(mode="json")
    return {key: value for key, value in content.items() if key not in _OF_THE_CALL}


def _short(setting: str) -> str:
    key, _, value = setting.partition("=")
    return f"{_safe(key.rpartition('.')[2])}{_safe(value)}"


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]+", "_", text)
