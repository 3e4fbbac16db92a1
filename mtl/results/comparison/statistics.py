"""Statistics of a comparison: relative gains over a baseline, ranks, paired differences with bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np

# By task and metric.
Values = Mapping[tuple[str, str], float]

_NUM_RESAMPLES = 10_000
_MOST_EXACT = 16
# A sign-flip test of n seeds cannot be below 2 / 2^n: 0.25 for three, 0.0625 for five, 0.031 for six.
LEAST_FOR_P = 5


class Metric(NamedTuple):
    """A metric of a task, and whether higher values are better."""

    task: str
    name: str
    is_higher: bool
    is_main: bool


@dataclass(frozen=True)
class DeltaM:
    """Relative differences to a baseline, of which three are in use. NaN if a value is missing or a baseline is 0.

    Attributes:
        per_task: The mean over tasks of the gain in the task's main metric, in percent, higher is better. Source:
            Maninis et al., arXiv 1904.08918, equation 4.
        flat: The mean over all metrics of the loss, in percent, lower is better: the sign that Nash-MTL (arXiv
            2202.01017, section 5) and FAMO print.
        by_task: Gains averaged over the metrics of a task, then over tasks, in percent, higher is better: LibMTL's
            delta_p.
    """

    per_task: float
    flat: float
    by_task: float


def delta_m(values: Values, baseline: Values, metrics: Sequence[Metric]) -> DeltaM:
    """All three, of one set of values."""
    gains = {metric: _gain(values, baseline, metric) for metric in metrics}
    tasks = dict.fromkeys(metric.task for metric in metrics)
    of_task = {task: [gain for metric, gain in gains.items() if metric.task == task] for task in tasks}
    main = [gain for metric, gain in gains.items() if metric.is_main]
    return DeltaM(_mean(main), -_mean([*gains.values()]), _mean([_mean(own) for own in of_task.values()]))


def _gain(values: Values, baseline: Values, metric: Metric) -> float:
    """In percent, positive if better."""
    one = values.get((metric.task, metric.name), math.nan)
    base = baseline.get((metric.task, metric.name), math.nan)
    if base == 0:
        return math.nan
    return (1 if metric.is_higher else -1) * (one - base) / abs(base) * 100


def mean_ranks(by_method: Mapping[str, Values], metrics: Sequence[Metric]) -> dict[str, float]:
    """The mean over all metrics of each method's rank, 1 is best; equal values share the mean of their ranks.

    A value that is missing, NaN or infinite is worse than any other; a metric that no method has does not count.
    """
    ranks: dict[str, list[float]] = {method: [] for method in by_method}
    for metric in metrics:
        key = (metric.task, metric.name)
        sign = 1 if metric.is_higher else -1
        found = {method: sign * values.get(key, math.nan) for method, values in by_method.items()}
        goodness = {method: value if math.isfinite(value) else -math.inf for method, value in found.items()}
        for method, value in goodness.items() if any(map(math.isfinite, goodness.values())) else ():
            better = sum(other > value for other in goodness.values())
            same = sum(other == value for other in goodness.values())
            ranks[method].append(1 + better + (same - 1) / 2)
    return {method: _mean(own) for method, own in ranks.items()}


@dataclass(frozen=True)
class Paired:
    """The difference of two methods over the same seeds.

    Attributes:
        mean: Of the differences.
        low: The lower end of the 95 % interval of a bootstrap over seeds (percentiles of 10,000 resamples); NaN of one
            seed.
        high: The upper end.
        p_value: Of a sign-flip test, two-sided; None of fewer than five seeds, of which it can say nothing.
    """

    mean: float
    low: float
    high: float
    p_value: float | None


def paired(one: Sequence[float], other: Sequence[float]) -> Paired:
    """The paired difference of values by seed, one - other."""
    differences = np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    if not np.isfinite(differences).all() or not len(differences):
        return Paired(math.nan, math.nan, math.nan, None)
    mean = float(differences.mean())
    if len(differences) == 1:
        return Paired(mean, math.nan, math.nan, None)
    drawn = np.random.default_rng(0).integers(len(differences), size=(_NUM_RESAMPLES, len(differences)))
    low, high = np.quantile(differences[drawn].mean(axis=1), [0.025, 0.975])
    p_value = sign_flip_p(differences) if len(differences) >= LEAST_FOR_P else None
    return Paired(mean, float(low), float(high), p_value)


def sign_flip_p(differences: np.ndarray) -> float:
    """The share of sign patterns whose mean is at least as far from 0: exact, of more than 16 values of random ones."""
    num, seen = len(differences), abs(differences.mean())
    if num <= _MOST_EXACT:
        signs = np.array(list(product((-1.0, 1.0), repeat=num)))
    else:
        signs = np.random.default_rng(0).choice((-1.0, 1.0), size=(100_000, num))
        signs[0] = 1.0
    means = np.abs((signs * differences).mean(axis=1))
    # Sums in another order may differ by a rounding.
    return float((means >= seen * (1 - 1e-12)).mean())


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation of a sample (n - 1); the latter is NaN of one value."""
    known = np.asarray(values, dtype=np.float64)
    return float(known.mean()), float(known.std(ddof=1)) if len(known) > 1 else math.nan


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
