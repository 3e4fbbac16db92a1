"""The numbers of a comparison, from the files of its runs: by method, the setting of the grid that was chosen."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mtl.results.comparison.design import SINGLE_TASK, Design, DesignError, Job
from mtl.results.comparison.statistics import DeltaM, Metric, Values, delta_m, mean_ranks
from mtl.results.report.run import SCORE, RunFiles, read_run

TRAIN_S, SPEED = "perf/train_s", "perf/images_per_s"
# What runs have spent alike where they are compared.
Equal = Literal["steps", "time"]
_UNKNOWN = DeltaM(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Measured:
    """A run's numbers.

    Attributes:
        job: The run.
        folder: Its directory.
        values: By task and metric, at its last validation, or the last one within the limit; empty if none is.
        score: `val/score` there.
        best_score: The best one of the run.
        steps: Optimizer steps until then.
        train_s: Seconds of training until then.
        images_per_s: Images trained until then by the seconds that their steps took.
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
        setting: The values of the grid with the best mean `val/score` over seeds; of `single-task` none, since each
            task has its own.
        num_settings: Among how many it was chosen.
        runs: Its runs, by seed; of `single-task`, one for each seed that joins those of the tasks.
        delta: Against the baseline, of the means over seeds.
        mean_rank: Over all metrics and methods.
    """

    name: str
    setting: tuple[str, ...]
    num_settings: int
    runs: tuple[Measured, ...]
    delta: DeltaM = _UNKNOWN
    mean_rank: float = math.nan


@dataclass(frozen=True)
class Comparison:
    """All numbers of a comparison.

    Attributes:
        methods: The methods in order; `single-task` first, if there is one.
        metrics: Of all tasks, in order.
        baseline: The name of the method that `delta` refers to.
        reference: The method that paired differences refer to: the first configuration.
        every: All runs, those of settings that were not chosen too.
        equal: What the runs of configurations are cut to; None if each is at its end.
        limit: The steps, or the seconds of training.
        failed: The names of runs that failed: their settings are not chosen, and have no row if all of one failed.
    """

    methods: tuple[Method, ...]
    metrics: tuple[Metric, ...]
    baseline: str
    reference: str
    every: tuple[Measured, ...]
    equal: Equal | None = None
    limit: float = math.inf
    failed: tuple[str, ...] = ()


def collect(folder: Path, design: Design, equal: Equal | None = None, failed: Collection[str] = ()) -> Comparison:
    """Reads the runs of a comparison.

    Args:
        folder: That of the comparison.
        design: The comparison.
        equal: Whether configurations are compared at equal steps or seconds of training: each run at its last
            validation within those in which the shortest configuration ended. Single-task runs are whole.
        failed: The names of the runs that failed.

    Raises:
        RunFileError: A file of a run is missing or damaged.
        DesignError: All runs of all configurations failed.
    """
    lost = {(job.method, job.setting, job.task) for job in design.jobs if job.name in failed}
    jobs = [job for job in design.jobs if (job.method, job.setting, job.task) not in lost]
    files = {job.name: read_run(folder / "runs" / job.name) for job in jobs}
    limit = math.inf if equal is None else _limit([job for job in jobs if job.task is None], files, equal)
    every = [measure(job, files[job.name], equal if job.task is None else None, limit) for job in jobs]
    chosen = {name: own for name in design.methods if (own := _best_setting(name, every)) is not None}
    if not chosen:
        raise DesignError("nothing to compare: no configuration has a setting of which the runs of all seeds ended")
    single = _single_task(design, every)
    if single is not None:
        chosen = {SINGLE_TASK: single, **chosen}
    metrics = _metrics(next(files[job.name] for job in jobs if job.task is None))
    means = {name: mean_values(own.runs, metrics) for name, own in chosen.items()}
    baseline, reference = next(iter(chosen)), next(name for name in chosen if name != SINGLE_TASK)
    ranks = mean_ranks(means, metrics)
    methods = tuple(
        replace(own, delta=delta_m(means[name], means[baseline], metrics), mean_rank=ranks[name])
        for name, own in chosen.items()
    )
    return Comparison(methods, metrics, baseline, reference, tuple(every), equal, limit, tuple(sorted(failed)))


def measure(job: Job, run: RunFiles, equal: Equal | None = None, limit: float = math.inf) -> Measured:
    """The numbers of a run, of all of it or until a limit of steps or seconds of training."""
    spent = {"steps": "step", "time": TRAIN_S}
    within = [row for row in run.validations if equal is None or row.get(spent[equal], math.inf) <= limit]
    row = within[-1] if within else {}
    values = {
        (task, metric): _number(row.get(f"val/{task}/{metric}")) for task, own in run.metrics.items() for metric in own
    }
    total = _number(run.results.get("train_s"))
    return Measured(
        job,
        run.folder,
        values,
        _number(row.get(SCORE)),
        max((_number(each[SCORE]) for each in within if each[SCORE] is not None), default=math.nan),
        row.get("step", 0),
        total if equal is None else _number(row.get(TRAIN_S)),
        _images_per_s(run, within),
        bool(run.audit["ok"]),
    )


def _images_per_s(run: RunFiles, validations: Sequence[Mapping[str, Any]]) -> float:
    """The speed of some epochs: images by seconds of their steps. An epoch's last batch counts like the others."""
    batch_size = {phase["name"]: phase["batch_size"] for phase in run.plan.get("phases", ())}
    images, seconds, before = 0.0, 0.0, 0
    for row in validations:
        number = (row["step"] - before) * batch_size.get(row["phase"], math.nan)
        before = row["step"]
        if number and row.get(SPEED):
            images, seconds = images + number, seconds + number / row[SPEED]
    return images / seconds if seconds else math.nan


def mean_values(runs: Sequence[Measured], metrics: Sequence[Metric]) -> Values:
    """The means over seeds."""
    keys = [(metric.task, metric.name) for metric in metrics]
    return {key: sum(run.values.get(key, math.nan) for run in runs) / len(runs) for key in keys}


def _metrics(run: RunFiles) -> tuple[Metric, ...]:
    return tuple(
        Metric(task, metric, run.direction(task, metric) == "higher", metric == run.main_metric(task))
        for task, own in run.metrics.items()
        for metric in own
        # A metric without a direction is none to compare by.
        if run.direction(task, metric) is not None
    )


def _best_setting(name: str, every: Sequence[Measured], task: str | None = None) -> Method | None:
    """A configuration with its best setting; None if none has all its runs."""
    by_setting: dict[tuple[str, ...], list[Measured]] = {}
    for run in every:
        if (run.job.method, run.job.task) == (name, task):
            by_setting.setdefault(run.job.setting, []).append(run)

    def mean_score(item: tuple[tuple[str, ...], list[Measured]]) -> float:
        score = sum(run.score for run in item[1]) / len(item[1])
        return score if math.isfinite(score) else -math.inf

    if not by_setting:
        return None
    setting, runs = max(by_setting.items(), key=mean_score)
    return Method(name, setting, len(by_setting), tuple(runs))


def _single_task(design: Design, every: Sequence[Measured]) -> Method | None:
    """The baselines, each task with its best setting, joined by seed; None if there are none, or one task has none."""
    tasks = dict.fromkeys(job.task for job in design.jobs if job.task is not None)
    each = [_best_setting(SINGLE_TASK, every, task) for task in tasks]
    found = [method for method in each if method is not None]
    if not found or len(found) < len(each):
        return None
    runs = tuple(_joined([method.runs[place] for method in found]) for place in range(len(found[0].runs)))
    return Method(SINGLE_TASK, (), max(method.num_settings for method in found), runs)


def _joined(single: Sequence[Measured]) -> Measured:
    """The runs of all tasks with one seed as one, whose steps and time are those of all together."""
    return Measured(
        single[0].job,
        single[0].folder.parent,
        {key: value for run in single for key, value in run.values.items()},
        sum(run.score for run in single) / len(single),
        sum(run.best_score for run in single) / len(single),
        sum(run.steps for run in single),
        sum(run.train_s for run in single),
        math.nan,
        all(run.is_clean for run in single),
    )


def _limit(jobs: Sequence[Job], files: Mapping[str, RunFiles], equal: Equal) -> float:
    """The least over configurations of what the longest of its runs has spent: then that one is compared whole."""
    spent: dict[str, float] = {}
    for job in jobs:
        last = files[job.name].validations[-1]
        own = _number(last["step"] if equal == "steps" else last.get(TRAIN_S))
        spent[job.method] = max(own, spent.get(job.method, 0.0))
    return min(spent.values(), default=math.inf)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
