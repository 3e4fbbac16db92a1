"""What a comparison trains: each configuration with every value of a grid and every seed, and single-task baselines."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from mtl.config import RunConfig, load_config
from mtl.results.comparison.single_task import single_task_overrides

SINGLE_TASK = "single-task"
# Where a run is: the comparison's own affair.
_OWN = ("name", "runs_dir", "resume", "seed")
# How a run is shown: not what it computes.
_SHOWN = ("tracking",)


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
        overrides: What it is trained with, where it is and how it is shown included.
        digest: Of all that decides what it computes.
        config: The whole configuration.
        task: The task of a single-task baseline.
    """

    name: str
    method: str
    setting: tuple[str, ...]
    seed: int
    file: Path
    overrides: tuple[str, ...]
    digest: str
    config: RunConfig
    task: str | None = None


@dataclass(frozen=True)
class Design:
    """A comparison.

    Attributes:
        jobs: Its runs, in order.
        methods: The configurations, in order; the first is what others are compared to.
    """

    jobs: tuple[Job, ...]
    methods: tuple[str, ...]


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
        folder: That of the comparison.

    Raises:
        DesignError: Two configurations have one name, a part of the grid cannot be read or has no effect, an override
            is of what the comparison sets itself, or the configurations do not have the same tasks.
        ConfigError: A configuration is wrong.
    """
    if num_seeds < 1:
        raise DesignError(f"--seeds: expected 1 or more, got {num_seeds}")
    methods = [file.stem for file in files]
    if twice := [name for name in methods if methods.count(name) > 1 or name == SINGLE_TASK]:
        raise DesignError(f"{twice[0]}: two configurations have this name; expected names that differ")
    for override in overrides:
        _check_key(override, "--set", _OWN)
    settings = _settings(grid)
    jobs = list[Job]()
    for file, method in zip(files, methods, strict=True):
        for setting in settings:
            name = "-".join([_safe(method), *map(_short, setting)])
            own = [*_Cell(name, method, setting, file, (*overrides, *setting)).jobs(num_seeds, folder)]
            expected, got = (jobs or own)[0].config.tasks, own[0].config.tasks
            if got.keys() != expected.keys():
                raise DesignError(
                    f"{file}: expected the tasks of {files[0]}, {', '.join(expected)}; got {', '.join(got)}"
                )
            jobs += own
    if with_single_task:
        for first in [job for job in jobs if job.method == methods[0] and job.seed == 0]:
            for task in first.config.tasks:
                name = "-".join([SINGLE_TASK, _safe(task), *map(_short, first.setting)])
                alone = (*overrides, *first.setting, *single_task_overrides(first.config, task))
                jobs += _Cell(name, SINGLE_TASK, first.setting, files[0], alone, task).jobs(num_seeds, folder)
        jobs = _without_repetitions(jobs)
    _check_all_differ(jobs)
    return Design(tuple(jobs), tuple(methods))


@dataclass(frozen=True)
class _Cell:
    """The runs of a comparison that differ in their seed only; attributes as those of `Job`."""

    name: str
    method: str
    setting: tuple[str, ...]
    file: Path
    overrides: tuple[str, ...]
    task: str | None = None

    def jobs(self, num_seeds: int, folder: Path) -> Iterator[Job]:
        for seed in range(num_seeds):
            own = [f"name={self.name}-seed{seed}", f"runs_dir={folder / 'runs'}", "resume=auto", f"seed={seed}"]
            config = load_config(self.file, [*self.overrides, *own])
            tracking = config.tracking
            if not tracking.is_off and tracking.backend == "wandb" and tracking.group is None:
                own.append(f"tracking.group={folder.resolve().name}")
            everything, digest = (*self.overrides, *own), _digest(config)
            yield Job(config.name, self.method, self.setting, seed, self.file, everything, digest, config, self.task)


def _digest(config: RunConfig) -> str:
    content = config.model_dump(mode="json", exclude={*_OWN, *_SHOWN} - {"seed"})
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _settings(grid: Sequence[str]) -> list[tuple[str, ...]]:
    values = [_values(text) for text in grid]
    keys = [own[0].partition("=")[0] for own in values]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise DesignError(f"--grid: {twice[0]} is given twice; expected all its values in one --grid")
    return [tuple(each) for each in product(*values)]


def _values(text: str) -> list[str]:
    """`key=a,b` as `key=a` and `key=b`."""
    key, equals, values = text.partition("=")
    found = [each.strip() for each in values.split(",")]
    if not key or not equals or not all(found):
        raise DesignError(f"--grid: expected key=value,value, such as optim.lr_scale=0.5,1; got {text!r}")
    _check_key(text, "--grid", (*_OWN, *_SHOWN))
    if len({*found}) < len(found):
        raise DesignError(f"--grid: {key}: expected values that differ, got {values}")
    return [f"{key}={each}" for each in found]


def _check_key(override: str, option: str, refused: Sequence[str]) -> None:
    key = override.partition("=")[0].strip()
    if (first := key.partition(".")[0]) in refused:
        what = {"seed": "; --seeds N says how many seeds", "tracking": "; it changes nothing that is compared"}
        raise DesignError(f"{option}: {key} is set by the comparison for each run{what.get(first, '')}")


def _without_repetitions(jobs: Sequence[Job]) -> list[Job]:
    """Without baselines that a setting of the grid does not change, such as one of a balancing method's options."""
    known = dict[tuple[str | None, str], Job]()
    return [job for job in jobs if job.task is None or known.setdefault((job.task, job.digest), job) is job]


def _check_all_differ(jobs: Sequence[Job]) -> None:
    by_name, by_digest = dict[str, Job](), dict[tuple[str, str], Job]()
    for job in jobs:
        if (other := by_name.setdefault(job.name, job)) is not job:
            raise DesignError(
                f"two runs would have the name {job.name}, of {_words(other)} and of {_words(job)}; expected names and"
                " values that differ in letters and digits"
            )
        if job.task is None and (other := by_digest.setdefault((job.method, job.digest), job)) is not job:
            raise DesignError(
                f"--grid: {_words(other)} and {_words(job)} are the same configuration; leave one value out, or the key"
                " that has no effect"
            )


def _words(job: Job) -> str:
    return ", ".join([job.method, *job.setting])


def _short(setting: str) -> str:
    key, _, value = setting.partition("=")
    return f"{_safe(key.rpartition('.')[2])}{_safe(value)}"


def _safe(text: str) -> str:
    """As a part of a run's name."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", text)
