"""One phase while it trains: its optimizer, what its gradients are shared by, and what guards its steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.optim import Optimizer

from mtl.distributed.ddp import wrap_ddp
from mtl.distributed.world import World
from mtl.optim.balance.balance import Balance
from mtl.optim.balance.subset import others_unmoved
from mtl.optim.group_names import group_names
from mtl.optim.lr_schedule import LrSchedule
from mtl.optim.optimizers import build_optimizer, parameters_of
from mtl.phases.resolve import Phase
from mtl.runtime.console import logger
from mtl.runtime.tensors import is_sharded
from mtl.tasks import Task
from mtl.training.nonfinite import StepGuard
from mtl.training.setup import RunSetup
from mtl.training.state import RunState
from mtl.training.step_sync import StepTasks
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
        groups = [[self._name_of[parameter] for parameter in group["params"]] for group in phase.groups]
        self._group_names = group_names(groups, [group["lr"] for group in phase.groups])
        if state.ema is not None:
            state.ema.follow(dict(zip(names, self.trainable, strict=True)))
        self.lr_schedule = LrSchedule(
            phase.optim.lr_schedule, self.optimizer, phase.num_steps, phase.steps_per_epoch, phase.plateau_direction
        )
        if state.lr_schedule is not None:
            self.lr_schedule.load_state_dict(state.lr_schedule)
        self.replica = wrap_ddp(setup.root, names, world)
        # Torch's own takes longer than a small layer, to do no more.
        self._has_own_zero_grad = type(self.optimizer).zero_grad is not Optimizer.zero_grad
        self._reached = phase.reached
        self._left_out: dict[tuple[str, ...], list[nn.Parameter]] = {}

    @property
    def rates(self) -> dict[str, float]:
        """The learning rates of the next step, by parameter group."""
        return dict(zip(self._group_names, self.lr_schedule.rates, strict=True))

    def silent(self, tasks: StepTasks, world: World) -> list[nn.Parameter]:
        """Parameters that the labelled tasks of a step do not reach; DDP waits for a gradient of zeros of each."""
        if not tasks.lacking or (tasks.names and world.is_alone):
            return []
        return [parameter for parameter in self._only_of(tasks) if not is_sharded(parameter)]

    def leave_out(self, tasks: StepTasks) -> None:
        """Leaves parameters out of a step that only tasks without labels in it depend on: not even decay moves them."""
        if tasks.lacking:
            for parameter in self._only_of(tasks):
                parameter.grad = None

    @contextmanager
    def others_unmoved(self, balance: Balance, tasks: StepTasks) -> Iterator[None]:
        """Leaves what a balancing method learns of tasks without labels in a step as it is, for the block."""
        if tasks.subset is None:
            yield
            return
        own = [parameter for parameter in balance.parameters() if parameter in self._name_of]
        with others_unmoved(own, lambda: self.optimizer, tasks.subset):
            yield

    def _only_of(self, tasks: StepTasks) -> list[nn.Parameter]:
        if not tasks.names:
            return self.trainable
        if tasks.lacking not in self._left_out:
            lost = frozenset[str]().union(*(self._reached[name] for name in tasks.lacking))
            kept = frozenset[str]().union(*(self._reached[name] for name in tasks.names))
            own = [parameter for parameter in self.trainable if self._name_of[parameter] in lost - kept]
            self._left_out[tasks.lacking] = own
        return self._left_out[tasks.lacking]

    def zero_grad(self) -> None:
        """Drops all gradients."""
        if self._has_own_zero_grad:
            self.optimizer.zero_grad(set_to_none=True)
        for parameter in self.trainable:
            parameter.grad = None

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
