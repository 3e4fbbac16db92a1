"""A run's state over time: kept after every validation and inside epochs, gone back to, taken up again."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mtl.checkpoint.folder import Checkpoints
from mtl.checkpoint.load import load_checkpoint
from mtl.distributed.ddp import Replica, wrap
from mtl.distributed.world import ALONE, World
from mtl.model.fsdp import FullModel, gather_model
from mtl.optim.balance.balance import Balance
from mtl.optim.ema import Ema
from mtl.optim.lr_schedule import LrSchedule, LrScheduleState
from mtl.optim.optimizer_state import OptimizerState
from mtl.optim.optimizers import build_optimizer, parameters_of
from mtl.phases.resolve import Phase
from mtl.runtime.best import Direction
from mtl.runtime.console import logger
from mtl.runtime.tensors import gathered, is_spread, spread_like
from mtl.training.best_checkpoints import BestWeights
from mtl.training.resume import Resumption
from mtl.training.setup import Parts


@dataclass
class Stepping:
    """What steps the parameters of one phase.

    Attributes:
        optimizer: Its optimizer.
        lr_schedule: The course of the learning rate.
        replica: What shares the gradients of exactly these parameters with other processes.
    """

    optimizer: Optimizer
    lr_schedule: LrSchedule
    replica: Replica


class Keeper:
    """Keeps a run's weights, what steps them, and the knowledge of which weights were best.

    Attributes:
        best: The best epochs so far.
        moments: What optimizers remember of parameters that rest, or between two phases.
        ema: The moving average of what trains, if there is one.
    """

    def __init__(self, parts: Parts, folder: Path, world: World = ALONE) -> None:
        self.best = BestWeights(phase.restore for phase in parts.phases)
        self.moments = OptimizerState()
        decay = parts.config.optim.ema_decay
        self.ema = None if decay is None else Ema(decay)
        self._parts = parts
        self._world = world
        self._checkpoints = Checkpoints(folder, mends=world.leads)
        self._is_spread = any(is_spread(parameter) for parameter in parts.root.parameters())
        self._in_shards = self._is_spread and parts.config.distributed.checkpoint == "dcp"
        self._name_of: dict[Tensor, str] = {parameter: name for name, parameter in parts.root.named_parameters()}

    def build_stepping(self, index: int, lr_schedule_state: LrScheduleState | None = None) -> Stepping:
        """The optimizer of a phase with the moments that its parameters last had, and the course of its rate.

        Args:
            index: The phase's place.
            lr_schedule_state: Where the course stood, if the phase is taken up in its middle; it begins anew if not.
        """
        phase = self._parts.phases[index]
        later = [each for each in self._parts.phases[index:] if not each.config.evaluate_only]
        self.moments.retain({name for each in later for name in each.freeze.plan.names.trainable})
        if phase.config.optimizer_state == "reset" and lr_schedule_state is None:
            self.moments.drop(phase.freeze.plan.names.trainable)
        optimizer = build_optimizer(phase.optim.optimizer, phase.groups)
        given = self.moments.apply(optimizer, self._name_of)
        if lr_schedule_state is not None and lr_schedule_state["step"] > 0 and not given:
            logger.warning("resume: the checkpoint has no moments for this optimizer; it begins without")
        if self.ema is not None:
            self.ema.follow({self._name_of[parameter]: parameter for parameter in parameters_of(optimizer)})
        lr_schedule = LrSchedule(
            phase.optim.lr_schedule, optimizer, phase.num_steps, phase.steps_per_epoch, phase.plateau_direction
        )
        if lr_schedule_state is not None:
            lr_schedule.load_state_dict(lr_schedule_state)
        names = [self._name_of[parameter] for parameter in parameters_of(optimizer)]
        return Stepping(optimizer, lr_schedule, wrap(self._parts.root, names, self._world))

    def put_away(self, stepping: Stepping) -> None:
        """Ends what has stepped a phase, and keeps what its optimizer remembers."""
        stepping.replica.close()
        self.moments.collect(stepping.optimizer, self._name_of)

    def judge(self, metrics: Mapping[str, float], step: int) -> list[str]:
        """Takes note of a validation after a step; returns the links of which the weights are the new best."""
        links, not_finite = self.best.see(metrics, step)
        for metric in not_finite:
            logger.warning(f"{metric} is {metrics[metric]} after step {step}: it does not count as best")
        return links

    def save(
        self,
        state: Mapping[str, Any],
        memory: Mapping[str, Any],
        stepping: Stepping | None,
        frozen: Collection[str],
        links: Sequence[str] = (),
        for_good: bool = False,
    ) -> Path:
        """Writes a checkpoint.

        Args:
            state: Where the run stands, as plain data; `step` names the folder.
            memory: The same with tensors in it.
            stepping: What steps the active phase's parameters.
            frozen: The active phase's frozen parameters and buffers.
            links: What it is the new best by.
            for_good: Whether it is kept until the end.

        Returns:
            Its folder.

        Raises:
            SaveError: The disk does not take it; those before are as they were.
        """
        # Where the model is spread, all processes bring together what the first one writes, or write with it.
        if not self._world.leads and not self._is_spread:
            self._world.barrier()
            return self._checkpoints.folder / "last"
        if stepping is not None:
            self.moments.collect(stepping.optimizer, self._name_of)
        state = {
            **state,
            "phases": [phase.name for phase in self._parts.phases],
            "frozen": list(frozen),
            "lr_schedule": None if stepping is None else stepping.lr_schedule.state_dict(),
            "best": self.best.state_dict(),
        }
        with self.averaged():
            memory = {
                **memory,
                "moments": self.moments.state_dict(),
                # Beside the averages, which are the model of the checkpoint, the weights as they train.
                "live": {} if self.ema is None else self.ema.averages(),
                "balance": [balance.state() for balance in self._balances()],
            }
            root, names = self._parts.root, ["last", *links]
            if self._in_shards:
                self._checkpoints.save_shards(root, frozen, memory, state, names, self._world, for_good)
            else:
                whole: nn.Module | FullModel = root
                if self._is_spread:
                    whole, memory = gather_model(root, self._world), gathered(memory, self._world.leads)
                if self._world.leads:
                    self._checkpoints.save(whole, frozen, memory, state, names, for_good)
        self._world.barrier()
        return self._checkpoints.folder / "last"

    def averaged(self) -> AbstractContextManager[None]:
        """Puts the moving averages, if there are any, in the place of what trains."""
        return nullcontext() if self.ema is None else self.ema.swapped_in()

    def rewind(self, phase: Phase, metric: str, direction: Direction) -> None:
        """Goes back to the best weights and buffers so far, and to the moments that the optimizers had with them."""
        folder = self._checkpoints.find(self.best.link(metric, direction))
        if folder is None:
            logger.warning(f"{phase.name}: there are no best weights by {metric} yet; it goes on from the last ones")
            return
        state, memory = load_checkpoint(folder, self._parts.root)
        self._load(memory)
        step, value = state["step"], state["best"][self.best.link(metric, direction)]["best"]["value"]
        logger.info(f"{phase.name}: back to the weights of step {step}, the best by {metric}: {value:.4g}")

    def _load(self, memory: Mapping[str, Any]) -> None:
        """Takes over moments, and the weights as they trained, if those in the model by now are averages."""
        self.moments.load_state_dict(memory["moments"])
        live = memory["live"]
        parameters = {name: self._parts.root.get_parameter(name) for name in live}
        if self.ema is not None:
            self.ema.load(parameters, {name: parameter.detach() for name, parameter in parameters.items()})
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(spread_like(parameter, live[name]))

    def _balances(self) -> list[Balance]:
        return list(self._parts.root.get_submodule("balance").children())  # type: ignore[arg-type]

    def take_up(self, resumption: Resumption) -> None:
        """Goes on where a checkpoint stands whose weights are in the model: its moments, its last and best weights."""
        self._load(resumption.memory)
        for balance, memory in zip(self._balances(), resumption.memory["balance"], strict=True):
            balance.load_state(memory, self._parts.device)
        steps = self.best.load_state_dict(resumption.state["best"])
        if not self._world.leads:
            self._world.barrier()
            return
        if resumption.in_place:
            self._checkpoints.drop_newer(resumption.step)
            # Whoever was killed behind a checkpoint and before its links has links that are behind.
            steps = {link: step for link, step in steps.items() if not self._checkpoints.is_at(link, step)}
        else:
            self._checkpoints.adopt(resumption.folder, resumption.step, "last")
        here = resumption.folder.resolve()
        for link, step in steps.items():
            source = here if step == resumption.step else here.parent / f"step-{step:08d}"
            if source.is_dir():
                self._checkpoints.adopt(source, step, link)
            else:
                self.best.forget(link)
                logger.warning(f"resume: the weights of step {step}, until then the {link}, are no longer there")
        self._world.barrier()
