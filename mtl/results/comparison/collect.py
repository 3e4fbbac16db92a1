"""The numbers of a comparison, from the files of its runs: by method, the setting of the grid that was chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mtl.results.comparison.design import SINGLE_TASK, Design, Job
from mtl.results.comparison.statistics import DeltaM, Metric, Values, delta_m, mean_ranks
from mtl.results.report.run import SCORE, RunFiles, read_run

TRAIN_S = "perf/train_s"


@dataclass(frozen=True)
class Measured:
    """A run's numbers.

    Attributes:
        job: The run.
        folder: Its directory.
        values: By task and metric, at its last validation, or the last one within the time.
        score: `val/score` there.
        best_score: The best one of the run.
        steps: Optimizer steps until then.
        train_s: Seconds of training until then.
        images_per_s: Of training, the median over the logged steps.
        is_clean: Whether the audit found nothing.
    """

    job: Job
    folder: Path
    values: Values
    score: float
    best_score: float
    steps: int
    train_s: float
    images_per_s: float
    is_clean: bool


@dataclass(frozen=True)
class Method:
    """A configuration with the setting that was best for it.

    Attributes:
        name: The configuration's.
        setting: The values of the grid with the best mean `val/score` over seeds.
        runs: Its runs, by seed; of `single-task`, one for each seed that joins those of the tasks.
        delta: Against the baseline, of the means over seeds.
        mean_rank: Over all metrics and methods.
    """

    name: str
    setting: tuple[str, ...]
    runs: tuple[Measured, ...]
    delta: DeltaM
    mean_rank: float


@dataclass(frozen=True)
class Comparison:
    """All numbers of a comparison.

    Attributes:
        methods: The methods in order; `single-task` first, if there is one.
        metrics: Of all tasks, in order.
        baseline: The name of the method that `delta` refers to.
        reference: The method that paired differences refer to: the first configuration.
        num_settings: Values of the grid that each was tuned over.
        every: All runs, those of settings that were not chosen too.
        seconds: The training time that all were cut to; None if they have all their steps.
    """

    methods: tuple[Method, ...]
    metrics: tuple[Metric, ...]
    baseline: str
    reference: str
    num_settings: int
    every: tuple[Measured, ...]
    seconds: float | None


def collect(folder: Path, design: Design, by_time: bool = False) -> Comparison:
    """Reads the runs of a comparison that is done.

    Args:
        folder: That of the comparison.
        design: The comparison.
        by_time: Whether runs are compared at equal training time, the shortest of any configuration's mean: each at
            its last validation until then.

    Raises:
        RunFileError: A file of a run is missing or damaged.
    """
    files = {job.name: read_run(folder / "runs" / job.name) for job in design.jobs}
    seconds = _shortest(design, files) if by_time else None
    every = [measure(job, files[job.name], seconds if job.task is None else None) for job in design.jobs]
    metrics = _metrics([files[job.name] for job in design.jobs if job.task is None][:1])
    chosen: dict[str, tuple[tuple[str, ...], list[Measured]]] = {}
    if single := [run for run in every if run.job.task is not None]:
        chosen[SINGLE_TASK] = ((), _joined(single))
    for name in design.methods:
        chosen[name] = _best_setting([run for run in every if run.job.method == name])
    means = {name: mean_values(runs, metrics) for name, (_, runs) in chosen.items()}
    baseline = SINGLE_TASK if single else design.methods[0]
    ranks = mean_ranks(means, metrics)
    methods = tuple(
        Method(name, setting, tuple(runs), delta_m(means[name], means[baseline], metrics), ranks[name])
        for name, (setting, runs) in chosen.items()
    )
    return Comparison(methods, metrics, baseline, design.methods[0], design.num_settings, tuple(every), seconds)


def measure(job: Job, run: RunFiles, seconds: float | None) -> Measured:
    """The numbers of a run, of all of it or of its first seconds of training."""
    rows = run.validations
    within = [row for row in rows if seconds is None or row.get(TRAIN_S, math.inf) <= seconds] or rows[:1]
    row = within[-1]
    values = {
        (task, metric): _number(row.get(f"val/{task}/{metric}")) for task, own in run.metrics.items() for metric in own
    }
    rates = [each["perf/images_per_s"] for each in run.steps if each.get("perf/images_per_s") is not None]
    total = _number(run.results.get("train_s"))
    return Measured(
        job,
        run.folder,
        values,
        _number(row[SCORE]),
        max((_number(each[SCORE]) for each in within if each[SCORE] is not None), default=math.nan),
        row["step"],
        _number(row.get(TRAIN_S, total)) if seconds is not None else total,
        float(np.median(rates)) if rates else math.nan,
        bool(run.audit["ok"]),
    )


def mean_values(runs: Sequence[Measured], metrics: Sequence[Metric]) -> Values:
    """The means over seeds."""
    keys = [(metric.task, metric.name) for metric in metrics]
    return {key: sum(run.values.get(key, math.nan) for run in runs) / len(runs) for key in keys}


def _metrics(runs: Sequence[RunFiles]) -> tuple[Metric, ...]:
    (run,) = runs
    return tuple(
        Metric(task, metric, run.direction(task, metric) == "higher", metric == run.main_metric(task))
        for task, own in run.metrics.items()
        for metric in own
        # A metric without a direction is none to compare by.
        if run.direction(task, metric) is not None
    )


def _best_setting(runs: Sequence[Measured]) -> tuple[tuple[str, ...], list[Measured]]:
    by_setting: dict[tuple[str, ...], list[Measured]] = {}
    for run in runs:
        by_setting.setdefault(run.job.setting, []).append(run)

    def mean_score(item: tuple[tuple[str, ...], list[Measured]]) -> float:
        score = sum(run.score for run in item[1]) / len(item[1])
        return score if math.isfinite(score) else -math.inf

    return max(by_setting.items(), key=mean_score)


def _joined(single: Sequence[Measured]) -> list[Measured]:
    """Of each seed, the runs of all tasks as one, whose time is that of all together."""
    by_seed: dict[int, list[Measured]] = {}
    for run in single:
        by_seed.setdefault(run.job.seed, []).append(run)
    return [
        Measured(
            own[0].job,
            own[0].folder.parent,
            {key: value for run in own for key, value in run.values.items()},
            sum(run.score for run in own) / len(own),
            sum(run.best_score for run in own) / len(own),
            sum(run.steps for run in own),
            sum(run.train_s for run in own),
            math.nan,
            all(run.is_clean for run in own),
        )
        for own in by_seed.values()
    ]


def _shortest(design: Design, files: Mapping[str, RunFiles]) -> float:
    """The least over methods of the mean seconds of training."""
    means = []
    for method in design.methods:
        own = [_number(files[job.name].results.get("train_s")) for job in design.jobs if job.method == method]
        means.append(sum(own) / len(own))
    return min(means)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
