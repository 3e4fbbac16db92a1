"""One phase while it trains: its optimizer, what its gradients are shared by, and what guards its steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from mtl.distributed.ddp import wrap_ddp
from mtl.distributed.world import World
from mtl.optim.lr_schedule import LrSchedule
from mtl.optim.optimizers import build_optimizer, parameters_of
from mtl.phases.resolve import Phase
from mtl.runtime.console import logger
from mtl.tasks import Task
from mtl.training.nonfinite import StepGuard
from mtl.training.setup import RunSetup
from mtl.training.state import RunState
from mtl.training.tracking.steps import StepLog


class PhaseOptimizer:
    """Steps exactly the trainable parameters of one phase; it always continues from the run's state.

    Attributes:
        optimizer: Holds the trainable parameters and nothing else, with the state that each last had.
        lr_schedule: The learning-rate schedule.
        replica: Averages the gradients of exactly these parameters over the processes.
        trainable: The parameters that the optimizer holds.
    """

    def __init__(self, setup: RunSetup, phase: Phase, state: RunState, world: World) -> None:
        self._name_of: dict[Tensor, str] = {parameter: name for name, parameter in setup.root.named_parameters()}
        self.optimizer = build_optimizer(phase.optim.optimizer, phase.groups)
        given = state.optimizer_state.apply(self.optimizer, self._name_of)
        if state.lr_schedule is not None and state.lr_schedule["step"] > 0 and not given:
            logger.warning("resume: the checkpoint has no state for this optimizer; it starts from scratch")
        self.trainable = parameters_of(self.optimizer)
        names = [self._name_of[parameter] for parameter in self.trainable]
        if state.ema is not None:
            state.ema.follow(dict(zip(names, self.trainable, strict=True)))
        self.lr_schedule = LrSchedule(
            phase.optim.lr_schedule, self.optimizer, phase.num_steps, phase.steps_per_epoch, phase.plateau_direction
        )
        if state.lr_schedule is not None:
            self.lr_schedule.load_state_dict(state.lr_schedule)
        self.replica = wrap_ddp(setup.root, names, world)

    def keep_state(self, state: RunState) -> None:
        """Copies what the optimizer has gathered into the run's state."""
        state.optimizer_state.collect(self.optimizer, self._name_of)

    def close(self, state: RunState) -> None:
        """Ends the phase's optimizer; the run's state keeps what it has gathered."""
        self.replica.close()
        self.keep_state(state)


@dataclass
class ActivePhase:
    """The phase that a run is in; made by `Trainer.active` alone.

    Attributes:
        phase: The phase, resolved.
        tasks: The tasks whose losses are active, by name.
        optim: What steps its parameters; None if it only evaluates.
        guard: Takes a step back whose loss or gradient is not finite, where `not_finite` says so.
        log: The steps of the epoch.
    """

    phase: Phase
    tasks: Mapping[str, Task]
    optim: PhaseOptimizer | None
    guard: StepGuard | None
    log: StepLog = field(init=False)
