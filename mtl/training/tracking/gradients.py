"""The tasks' gradients on the trunk, analysed at a cadence and logged: rows, a table and a heat map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from mtl.optim.task_gradients import GradientAnalysis, analyse, trunk_groups
from mtl.runtime.console import logger
from mtl.runtime.tensors import is_sharded
from mtl.runtime.text import count, shorten
from mtl.training.tracking.gradient_figure import draw_gradients, png_of
from mtl.training.tracking.steps import StepLog
from mtl.training.tracking.tracker import Tracker


class GradientLog:
    """Looks at the gradients on the first step of each phase, and on every N-th step after it. No other step waits."""

    def __init__(self, tracker: Tracker, trunk: nn.Module, every_steps: int) -> None:
        """Args:
        tracker: Where tables and pictures go.
        trunk: The shared part.
        every_steps: N; 0 for never.
        """
        self._tracker = tracker
        self._trunk = trunk
        self._every_steps = every_steps
        if every_steps and any(is_sharded(parameter) for parameter in trunk.parameters()):
            # One process alone would wait for the others in each backward of its own.
            logger.info("gradients are not analysed: the trunk is sharded over the processes (fsdp2)")
            self._every_steps = 0
        self._phase = ""
        self._tasks: tuple[str, ...] = ()
        self._groups: dict[str, list[nn.Parameter]] = {}
        self._first_step = self._looked_at = 0
        self._has_warned = False

    def enter(self, phase: str, tasks: Sequence[str], first_step: int) -> None:
        """Begins a phase; its trainable parameters must require a gradient by now.

        Args:
            phase: Its name.
            tasks: Its active tasks.
            first_step: The number of its first step, which is in the past if the run resumes inside the phase.
        """
        self._phase, self._tasks, self._first_step = phase, tuple(tasks), first_step
        self._groups = trunk_groups(self._trunk) if self._every_steps else {}
        self._looked_at, self._has_warned = 0, False

    def before_backward(self, losses: Mapping[str, Tensor], step: int, log: StepLog) -> None:
        """Analyses the losses if it is time, from the first batch of a step only.

        Args:
            losses: The losses of the step's tasks, each a scalar with its graph.
            step: The number of the step that they are for.
            log: The steps' log, which takes the row.
        """
        if not self._groups or step == self._looked_at or (step - self._first_step) % self._every_steps:
            return
        self._looked_at = step
        analysis = analyse(losses, self._groups) if losses else None
        if analysis is None:
            return
        # All of them are in the table and the picture; as charts they would be dozens, of a few points each.
        log.add_row(step, analysis.to_row(), shown=["grad/conflict_share"])
        rows = [(task, group, norm) for task, norms in _reached(analysis).items() for group, norm in norms.items()]
        self._tracker.log_table("grad/norms", ["task", "group", "norm"], rows, step)
        name, draw = "grad/heat_map", partial(_drawn, analysis)
        self._tracker.later(name, lambda: self._tracker.log_picture(name, draw, step))
        if len(losses) == len(self._tasks):
            self._warn_of_unreached(analysis.unreached)

    def _warn_of_unreached(self, unreached: Sequence[str]) -> None:
        if unreached and not self._has_warned:
            self._has_warned = True
            groups, names = count(len(unreached), "depth group"), shorten(list(unreached), 6)
            logger.warning(f"{self._phase}: no task's loss reaches {groups} of the trunk that train ({names})")


def _drawn(analysis: GradientAnalysis) -> bytes:
    return png_of(draw_gradients(analysis))


def _reached(analysis: GradientAnalysis) -> dict[str, dict[str, float | None]]:
    """Norms by task and group, None where the task does not reach the group."""
    return {
        task: {group: norm if group in analysis.reached[task] else None for group, norm in norms.items()}
        for task, norms in analysis.norms.items()
    }
