"""A run's weights over time: kept after every validation, gone back to, taken up from another run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mtl.assembly import Parts
from mtl.best import Direction
from mtl.best_weights import BestWeights
from mtl.checkpoint import CheckpointError, Checkpoints, MomentsState, load_checkpoint
from mtl.console import logger
from mtl.ema import Ema
from mtl.lr_schedule import LrSchedule, LrScheduleState
from mtl.optim import Moments, build_optimizer, held_by
from mtl.phases import Phase
from mtl.scheduler import SchedulerState, TaskScheduler

# Under this name, weights as they train lie beside moments in a checkpoint whose model is an average.
_LIVE = "live"


@dataclass
class Stepping:
    """What steps the parameters of one phase: its optimizer, and the course of the learning rate."""

    optimizer: Optimizer
    lr_schedule: LrSchedule


@dataclass(frozen=True)
class Resumption:
    """Where another run stood when it wrote a checkpoint, whose weights the model has by now.

    Attributes:
        folder: The checkpoint.
        step: Steps done.
        epoch: Epochs done.
        scheduler: The task scheduler's state.
        lr_schedule: The state of the rate's course, if the checkpoint was written inside a phase.
        moments: What the optimizers remembered.
        best: The best epochs until then.
    """

    folder: Path
    step: int
    epoch: int
    scheduler: SchedulerState
    lr_schedule: LrScheduleState | None
    moments: MomentsState
    best: Mapping[str, Any]


def resume_from(folder: Path, parts: Parts) -> Resumption:
    """Loads the weights of another run's checkpoint, and finds out where that run stood.

    Raises:
        CheckpointError: It is no checkpoint, or one of a run with another model or other phases, or one that is over.
    """
    state, moments = load_checkpoint(folder, parts.root)
    try:
        return _resumption(folder, state, moments, parts)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder} is damaged, or of another version: {error!r}") from error


def _resumption(folder: Path, state: Mapping[str, Any], moments: MomentsState, parts: Parts) -> Resumption:
    names = [phase.name for phase in parts.phases]
    if state["phases"] != names:
        raise CheckpointError(
            f"{folder} is of a run with the phases {', '.join(state['phases'])}; this one has {', '.join(names)}"
        )
    scheduler = TaskScheduler([phase.length for phase in parts.phases])
    best = BestWeights(phase.restore for phase in parts.phases)
    try:
        scheduler.load_state_dict(state["scheduler"])
        best.load_state_dict(state["best"])
    except ValueError as error:
        done = state["scheduler"]
        phase = names[min(done["index"], len(names) - 1)]
        raise CheckpointError(
            f"{folder} stands in phase {phase!r} after {done['epochs']} epochs and {done['steps']} steps;"
            " this configuration has no such place"
        ) from error
    if scheduler.index is None:
        raise CheckpointError(f"{folder} is the end of its run: no phase is left; one inside a phase can be taken up")
    inside = state["scheduler"]["steps"] > 0
    active = parts.phases[scheduler.index]
    if inside and state["frozen"] != list(active.freeze.plan.names.frozen):
        raise CheckpointError(f"{folder} stands inside a phase {active.name!r} that froze other parameters than here")
    course = state["lr_schedule"]
    lr_schedule = LrScheduleState(step=course["step"], scale=course["scale"], best=course["best"]) if inside else None
    return Resumption(folder, state["step"], state["epoch"], state["scheduler"], lr_schedule, moments, state["best"])


class Keeper:
    """Keeps a run's weights, the optimizers' moments, and the knowledge of which weights were best.

    Attributes:
        best: The best epochs so far.
        moments: What optimizers remember of parameters that rest, or between two phases.
        ema: The moving average of what trains, if there is one.
    """

    def __init__(self, parts: Parts, folder: Path) -> None:
        self.best = BestWeights(phase.restore for phase in parts.phases)
        self.moments = Moments()
        decay = parts.config.optim.ema_decay
        self.ema = None if decay is None else Ema(decay)
        self._parts = parts
        self._checkpoints = Checkpoints(folder)
        self._name_of: dict[Tensor, str] = {parameter: name for name, parameter in parts.root.named_parameters()}

    def build_stepping(self, index: int, lr_schedule_state: LrScheduleState | None = None) -> Stepping:
        """The optimizer of a phase with the moments that its parameters last had, and the course of its rate.

        Args:
            index: The phase's place.
            lr_schedule_state: Where the course stood, if the phase is taken up in its middle; it begins anew if not.
        """
        phase = self._parts.phases[index]
        later = [each for each in self._parts.phases[index:] if not each.config.evaluate_only]
        self.moments.keep_only({name for each in later for name in each.freeze.plan.names.trainable})
        if phase.config.optimizer_state == "reset" and lr_schedule_state is None:
            self.moments.forget(phase.freeze.plan.names.trainable)
        optimizer = build_optimizer(phase.optim.optimizer, phase.groups)
        given = self.moments.give(optimizer, self._name_of)
        if lr_schedule_state is not None and not given:
            logger.warning("resume: the checkpoint has no moments for this optimizer; it begins without")
        if self.ema is not None:
            self.ema.follow({self._name_of[parameter]: parameter for parameter in held_by(optimizer)})
        lr_schedule = LrSchedule(
            phase.optim.lr_schedule, optimizer, phase.num_steps, phase.steps_per_epoch, phase.plateau_direction
        )
        if lr_schedule_state is not None:
            lr_schedule.load_state_dict(lr_schedule_state)
        return Stepping(optimizer, lr_schedule)

    def save(
        self,
        row: Mapping[str, Any],
        metrics: Mapping[str, float],
        scheduler: SchedulerState,
        frozen: Sequence[str],
        stepping: Stepping | None,
    ) -> None:
        """Writes a checkpoint; nothing if there is one of this step.

        Args:
            row: What was logged of the validation that judged these weights.
            metrics: Its metrics.
            scheduler: The task scheduler's state.
            frozen: The active phase's frozen parameters.
            stepping: What steps the active phase's parameters.
        """
        step = row["step"]
        if self._checkpoints.has(step):
            return
        links, not_finite = self.best.see(metrics, step)
        for metric in not_finite:
            logger.warning(f"{metric} is {metrics[metric]} after step {step}: it does not count as best")
        if stepping is not None:
            self.moments.take(stepping.optimizer, self._name_of)
        state = {
            **row,
            "phases": [phase.name for phase in self._parts.phases],
            "scheduler": scheduler,
            "frozen": list(frozen),
            "lr_schedule": None if stepping is None else stepping.lr_schedule.state_dict(),
            "best": self.best.state_dict(),
        }
        with self.averaged():
            # Beside the averages, which are the model of the checkpoint, the weights as they train.
            live = {} if self.ema is None else {_LIVE: {n: {"value": t} for n, t in self.ema.averages().items()}}
            self._checkpoints.save(self._parts.root, self.moments.state_dict() | live, state, ["last", *links])

    def averaged(self) -> AbstractContextManager[None]:
        """Puts the moving averages, if there are any, in the place of what trains."""
        return nullcontext() if self.ema is None else self.ema.swapped_in()

    def rewind(self, phase: Phase, metric: str, direction: Direction) -> None:
        """Goes back to the best weights and buffers so far, and to the moments that the optimizers had with them."""
        folder = self._checkpoints.find(self.best.link(metric, direction))
        if folder is None:
            logger.warning(f"{phase.name}: there are no best weights by {metric} yet; it goes on from the last ones")
            return
        state, moments = load_checkpoint(folder, self._parts.root)
        self._load(moments)
        step, value = state["step"], state["best"][self.best.link(metric, direction)]["best"]["value"]
        logger.info(f"{phase.name}: back to the weights of step {step}, the best by {metric}: {value:.4g}")

    def _load(self, moments: MomentsState) -> None:
        """Takes over moments, and the weights as they trained, if those in the model by now are averages."""
        live = {name: state["value"] for name, state in moments.get(_LIVE, {}).items()}
        self.moments.load_state_dict({kind: kept for kind, kept in moments.items() if kind != _LIVE})
        parameters = {name: self._parts.root.get_parameter(name) for name in live}
        if self.ema is not None:
            self.ema.load(parameters, {name: parameter.detach() for name, parameter in parameters.items()})
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(live[name])

    def take_up(self, resumption: Resumption) -> None:
        """Goes on with another run's moments, last and best weights, of which it takes copies."""
        self._load(resumption.moments)
        self._checkpoints.adopt(resumption.folder, resumption.step, "last")
        for link, step in self.best.load_state_dict(resumption.best).items():
            here = resumption.folder.resolve()
            source = here if step == resumption.step else here.parent / f"step-{step:08d}"
            if source.is_dir():
                self._checkpoints.adopt(source, step, link)
            else:
                self.best.forget(link)
                logger.warning(f"resume: the weights of step {step}, until then the {link}, are no longer there")
