"""Shows a run in a backend, in addition to its rows: plan, phases, predictions, alerts, the table of results."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtl.audit import Report
from mtl.audit.report import grouped
from mtl.checkpoint.run_files import STATE, RunFileError, read_state_file
from mtl.distributed.world import World
from mtl.phases.metrics import BEST_SCORE, SCORE
from mtl.phases.plan.picture import draw_plan
from mtl.phases.resolve import Phase
from mtl.training.nonfinite import NotFiniteError
from mtl.training.setup import RunSetup
from mtl.training.tracking.backend import BestCheckpoint
from mtl.training.tracking.predictions import PredictionLog
from mtl.training.tracking.tracker import Tracker
from mtl.training.validation import Scores

# Lines of an alert.
_MOST_LINES = 5


class Dashboard:
    """One for each run.

    Attributes:
        predictions: Shows predictions after validations.
    """

    def __init__(self, setup: RunSetup, run_dir: Path, tracker: Tracker, world: World) -> None:
        self._setup = setup
        self._run_dir = run_dir
        self._tracker = tracker
        self._num_alerted = 0
        self._was_skipped = False
        self.predictions = PredictionLog(tracker, setup, world)

    def number_of(self, phase: Phase) -> int:
        """A phase's number, from 1."""
        return next(number for number, each in enumerate(self._setup.phases, 1) if each.name == phase.name)

    def begin(self, step: int) -> None:
        """Shows what is known before the first step; not where a run is resumed in place."""
        plan, columns = self._setup.plan, ["number", "phase", "length", "frozen parameters", "trained parameters"]
        rows = [
            (number, phase.name, phase.length, phase.frozen.parameters, phase.trainable.parameters)
            for number, phase in enumerate(plan.phases, 1)
        ]
        self._tracker.log_table("plan/phases", columns, rows, step)
        self._tracker.later("plan/picture", lambda: self._tracker.log_picture("plan/picture", self._draw_plan, step))

    def resume(self, report: Report) -> None:
        """Alerts of what was found before a run was resumed have been sent."""
        self._num_alerted = len(report.violations)

    def begin_phase(self, phase: Phase, step: int) -> None:
        """Marks where a phase begins, once."""
        number = self.number_of(phase)
        plan = self._setup.plan.phases[number - 1]
        counts = {"frozen_parameters": plan.frozen.parameters, "trained_parameters": plan.trainable.parameters}
        shown: dict[str, float | int | str] = {"begins": phase.name, "number": number, **counts}
        self._tracker.show({"step": step, **{f"phase/{name}": value for name, value in shown.items()}})

    def found(self, report: Report, step: int) -> None:
        """Alerts of violations that the audit has found since the last time."""
        new = report.violations[self._num_alerted :]
        if new:
            self._num_alerted = len(report.violations)
            lines = grouped(new)
            more = [f"and {len(lines) - _MOST_LINES} more kinds"] if len(lines) > _MOST_LINES else []
            text = "\n".join([*lines[:_MOST_LINES], *more])
            self._tracker.alert(f"{self._setup.config.name}: audit violation", text, step)

    def not_finite(self, error: NotFiniteError, is_skipped: bool = False) -> None:
        """Alerts of a loss or gradient that is not finite; of steps that are left out, once."""
        if is_skipped and self._was_skipped:
            return
        self._was_skipped = is_skipped
        text = f"{error.fact}: the step is left out, as others may be" if is_skipped else str(error)
        self._tracker.alert(f"{self._setup.config.name}: {error.what} is not finite", text, error.step)

    def end(
        self, scores: Mapping[str, Scores], report: Report, best: tuple[float, int], step: int, failed: bool
    ) -> None:
        """Shows the table of results, and ends tracking.

        Args:
            scores: Metrics at the end of each phase that has ended, by the phase's name.
            report: The audit's.
            best: The best `val/score`, NaN if there is none, and the step after which it was reached.
            step: Steps done.
            failed: Whether the run did not come to its end.
        """
        checkpoint = self._best_checkpoint(best[1])
        self._tracker.log_table(*self._results(scores, {} if checkpoint is None else checkpoint.metrics), step)
        summary: dict[str, Any] = {"audit/ok": report.ok, "audit/violations": len(report.violations)}
        summary[BEST_SCORE] = best[0]
        if checkpoint is not None:
            summary["best/step"] = checkpoint.step
            summary |= {name.replace("val/", "best/", 1): value for name, value in checkpoint.metrics.items()}
        self._tracker.finish(summary, failed, None if failed else checkpoint)

    def _results(
        self, scores: Mapping[str, Scores], best: Mapping[str, float]
    ) -> tuple[str, list[str], list[list[str | float | None]]]:
        """The name, columns and rows of the table: every metric of the trivial predictor, each phase, and the best."""
        columns = [self._setup.trivial, *scores.values()]
        rows = [
            [task, name, *(_number(each[task].get(name)) for each in columns), _number(best.get(f"val/{task}/{name}"))]
            for task, metrics in self._setup.trivial.items()
            for name in metrics
        ]
        return "results", ["task", "metric", "trivial", *scores, "best"], rows

    def _best_checkpoint(self, step: int) -> BestCheckpoint | None:
        folder = self._run_dir / "checkpoints" / "best"
        try:
            state = read_state_file(folder / STATE) if folder.exists() else {}
        except RunFileError:
            return None
        if state.get("step") != step:
            return None
        names = [name for name in state if name.startswith("val/") and name != BEST_SCORE]
        metrics = {name: state[name] for name in names if state[name] is not None}
        return BestCheckpoint(folder.resolve(), step, metrics) if SCORE in metrics else None

    def _draw_plan(self) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "plan.png"
            draw_plan(self._setup.plan, file)
            return file.read_bytes()


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value
