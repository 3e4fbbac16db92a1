"""The metrics of a run, which conditions, schedules and `restore` may name."""

from __future__ import annotations

from collections.abc import Mapping

from mtl.config import RunConfig
from mtl.config.yaml_source import KeyPath
from mtl.runtime.best import Direction
from mtl.runtime.text import hint
from mtl.tasks import Task

SCORE = "val/score"
# The best value of it so far.
BEST_SCORE = "val/best_score"


class RunMetrics:
    """The metrics of a run by name, and which of their values are better."""

    def __init__(self, config: RunConfig, tasks: Mapping[str, Task]) -> None:
        self._config = config
        self._directions: dict[str, Direction | None] = {SCORE: "higher", "train/loss": "lower"}
        for name, task in tasks.items():
            metrics = task.every_metric()
            for metric in metrics.compute():
                is_main = metric == task.goal.metric
                known = task.goal.direction if is_main else metrics.direction(metric)
                self._directions[f"val/{name}/{metric}"] = known

    @property
    def directions(self) -> Mapping[str, Direction | None]:
        """Which values of each metric are better; None where that is not known."""
        return self._directions

    def direction(self, metric: str, configured: Direction | None, path: KeyPath, key: str = "metric") -> Direction:
        """Which values of a metric are better: the configured direction, else the known one.

        Raises:
            ConfigError: There is no such metric, or nobody says.
        """
        if metric not in self._directions:
            there = f"there are: {', '.join(self._directions)}"
            raise self._config.mistake((*path, key), f"no metric {metric!r}{hint(metric, self._directions)}; {there}")
        direction = configured or self._directions[metric]
        if direction is None:
            own = metric.rsplit("/", 1)[-1]
            message = (
                f"expected higher or lower: which values of {metric} are better; write it here, or name {own!r} in"
                " `higher` or `lower` of its class"
            )
            raise self._config.mistake((*path, "direction"), message)
        return direction
