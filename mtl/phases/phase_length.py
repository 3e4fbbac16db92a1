"""The length of a phase as the scheduler takes it, and the metrics that conditions may name."""

from __future__ import annotations

from collections.abc import Mapping

from mtl.config import RunConfig
from mtl.config.phase import PhaseConfig, UntilConfig, WrittenPhase
from mtl.config.yaml_source import KeyPath
from mtl.phases.conditions import AllOf, AnyOf, Condition, PhaseLength, Plateau, Reached, Spent
from mtl.runtime.best import Direction
from mtl.runtime.text import count, hint
from mtl.tasks import Task

SCORE = "val/score"


class Metrics:
    """The metrics of a run by name, and which of their values are better."""

    def __init__(self, config: RunConfig, tasks: Mapping[str, Task]) -> None:
        self._config = config
        self._directions: dict[str, Direction | None] = {SCORE: "higher", "train/loss": "lower"}
        for name, task in tasks.items():
            for metric in task.metrics().compute():
                known: Direction = "higher" if task.goal.higher_is_better else "lower"
                self._directions[f"val/{name}/{metric}"] = known if metric == task.goal.metric else None

    def direction(self, metric: str, said: Direction | None, path: KeyPath, key: str = "metric") -> Direction:
        """Which values of a metric are better: what the user said, else what is known.

        Raises:
            ConfigError: There is no such metric, or nobody says.
        """
        if metric not in self._directions:
            there = f"there are: {', '.join(self._directions)}"
            raise self._config.mistake((*path, key), f"no metric {metric!r}{hint(metric, self._directions)}; {there}")
        direction = said or self._directions[metric]
        if direction is None:
            message = f"expected higher or lower: which values of {metric} are better"
            raise self._config.mistake((*path, "direction"), message)
        return direction

    def length(self, written: WrittenPhase) -> PhaseLength:
        """A phase's length.

        Raises:
            ConfigError: A condition names a metric that there is not, or does not say which of its values are better.
        """
        phase = written.config
        until = None if phase.until is None else self._condition(phase.until, (*written.path, "until"))
        return PhaseLength(
            written.name,
            phase.epochs,
            phase.steps,
            until,
            phase.max_epochs,
            phase.max_steps,
            phase.evaluate_only,
        )

    def _condition(self, until: UntilConfig, path: KeyPath) -> Condition:
        if until.plateau is not None:
            direction = self.direction(until.plateau, until.direction, path, "plateau")
            return Plateau(until.plateau, until.patience or 1, direction, until.min_delta or 0.0)
        if until.metric is not None:
            self.direction(until.metric, "higher", path)
            if until.at_least is not None:
                return Reached(until.metric, until.at_least, "higher")
            return Reached(until.metric, until.at_most or 0.0, "lower")
        if until.wall_time_s is not None:
            return Spent(until.wall_time_s, "seconds")
        if until.epochs is not None:
            return Spent(until.epochs, "epochs")
        if until.steps is not None:
            return Spent(until.steps, "steps")
        key, kind = ("any", AnyOf) if until.any is not None else ("all", AllOf)
        inner = until.any or until.all or []
        return kind(tuple(self._condition(each, (*path, key, index)) for index, each in enumerate(inner)))


def length_in_words(config: PhaseConfig, num_steps: int) -> str:
    """How long a phase lasts, as it was written.

    Args:
        config: The phase.
        num_steps: Its length in optimizer steps, at most.
    """
    if config.evaluate_only:
        return "one evaluation"
    if config.epochs is not None:
        return f"{count(config.epochs, 'epoch')} ({num_steps} steps)"
    if config.steps is not None:
        return count(config.steps, "step")
    limits = [count(n, unit) for n, unit in ((config.max_epochs, "epoch"), (config.max_steps, "step")) if n]
    steps = f" ({num_steps} steps)" if config.max_epochs is not None else ""
    return f"until {_condition_in_words(config.until)}, at most {' or '.join(limits)}{steps}"


def _condition_in_words(until: UntilConfig | None) -> str:
    if until is None:
        return ""
    if until.plateau is not None:
        return f"plateau of {until.plateau} for {count(until.patience or 1, 'epoch')}"
    if until.metric is not None:
        if until.at_least is not None:
            return f"{until.metric} is at least {until.at_least:g}"
        return f"{until.metric} is at most {until.at_most:g}"
    for amount, unit in ((until.wall_time_s, "second"), (until.epochs, "epoch"), (until.steps, "step")):
        if amount is not None:
            return count(amount, unit)
    inner = map(_condition_in_words, until.any or until.all or [])
    return f"({(' or ' if until.any is not None else ' and ').join(inner)})"
