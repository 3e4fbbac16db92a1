"""Which epochs had the best weights, by every metric that a phase or a user goes by."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from mtl.phases.metrics import SCORE
from mtl.runtime.best import Best, Direction


class BestWeights:
    """The best epoch of a run by `val/score`, and by every metric that a phase goes back to the best weights of."""

    def __init__(self, restores: Iterable[tuple[str, Direction] | None]) -> None:
        """Args:
        restores: Metric and direction that each phase goes back to, if it does.
        """
        goals: dict[tuple[str, Direction], None] = {(SCORE, "higher"): None}
        goals |= dict.fromkeys(goal for goal in restores if goal is not None)
        self._best = {goal: Best(goal[1]) for goal in goals}
        self._step = dict.fromkeys(goals, 0)

    @staticmethod
    def link(metric: str, direction: Direction) -> str:
        """The name under which the best checkpoint by a metric is found."""
        if (metric, direction) == (SCORE, "higher"):
            return "best"
        return f"best-{direction}-{metric.replace('/', '-')}"

    def record(self, metrics: Mapping[str, float], step: int) -> tuple[list[str], list[str]]:
        """Records a validation after a step.

        Returns:
            The links of which these weights are the new best, and the metrics that are not finite, which never count.
        """
        links = []
        for (metric, direction), best in self._best.items():
            if best.update(metrics[metric]):
                self._step[metric, direction] = step
                links.append(self.link(metric, direction))
        return links, sorted({metric for metric, _ in self._best if not math.isfinite(metrics[metric])})

    @property
    def score(self) -> float:
        """The best `val/score`; NaN before there is one."""
        value = self._best[SCORE, "higher"].value
        return math.nan if value is None else value

    @property
    def step(self) -> int:
        """The step after which it was reached."""
        return self._step[SCORE, "higher"]

    def state_dict(self) -> dict[str, Any]:
        return {
            self.link(*goal): {"best": best.state_dict(), "step": self._step[goal]} for goal, best in self._best.items()
        }

    @property
    def steps(self) -> dict[str, int]:
        """By link, the step of the best weights, where there are any."""
        return {self.link(*goal): self._step[goal] for goal, best in self._best.items() if best.value is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads what another run with the same goals had found; goals that it did not have start from scratch."""
        for goal, best in self._best.items():
            saved = state.get(self.link(*goal))
            if saved is not None and saved["best"]["value"] is not None:
                best.load_state_dict(saved["best"])
                self._step[goal] = saved["step"]

    def forget(self, link: str) -> None:
        """Forgets the best weights of a link."""
        for goal in self._best:
            if self.link(*goal) == link:
                self._best[goal], self._step[goal] = Best(goal[1]), 0
