"""All of a run that survives a restart: one object, restored once, before the loop."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler

from mtl.audit import GradientAudit
from mtl.distributed.world import World
from mtl.optim.balance.balance import Balance
from mtl.optim.ema import Ema
from mtl.optim.lr_schedule import LrScheduleState
from mtl.optim.optimizer_state import OptimizerState
from mtl.patterns import text_of
from mtl.phases.resolve import Phase
from mtl.phases.scheduler import PhaseChange, TaskScheduler
from mtl.runtime.console import logger
from mtl.runtime.provenance import provenance
from mtl.runtime.rng import random_state, seed_process, set_random_state
from mtl.runtime.tensors import shard_like
from mtl.training.best_checkpoints import BestWeights
from mtl.training.features import FeatureSource
from mtl.training.history import UNKNOWN, History
from mtl.training.resume import Resumption, frozen_names
from mtl.training.setup import RunSetup
from mtl.training.step_sync import load_buffers
from mtl.training.tracking.record import RunRecord
from mtl.training.tracking.tracker import Tracker
from mtl.training.validation import Scores


class RunState:
    """Where a run is, and everything that its next step depends on. A fresh run is a state at zero.

    Attributes:
        phase_index: The phase that is active, or begins next.
        in_phase: Whether it has begun; a resumed run is inside one.
        change: The end of the phase, once it has come.
        step: Optimizer steps done in the run.
        epoch: The number of the epoch that is running, or was the last one.
        steps_in_epoch: Steps done in it; None between epochs.
        epoch_sums: Of a resumed epoch, the sums of its log.
        epoch_is_whole: Whether the last epoch went through the training data to its end.
        num_skipped: Steps that were left out, since a loss or gradient was not finite.
        lr_schedule: The state of a resumed phase's learning-rate schedule.
        optimizer_state: Optimizer state of parameters that are frozen now, or between two phases.
        ema: The moving average of the trainable parameters, if there is one.
        best: Which epochs had the best weights.
        scores: Metrics at the end of each phase, by the phase's name.
        history: The command that began the run, and what was changed on resume.
        record: The run's sessions, and the ends of its phases.
    """

    def __init__(
        self,
        setup: RunSetup,
        audit: GradientAudit,
        scaler: GradScaler,
        features: FeatureSource,
        tracker: Tracker,
        world: World,
        history: History = UNKNOWN,
    ) -> None:
        self.setup, self.world, self.history = setup, world, history
        self.audit, self.scaler, self.features, self.tracker = audit, scaler, features, tracker
        self.scheduler = TaskScheduler([phase.length for phase in setup.phases])
        self.phase_index, self.in_phase = 0, False
        self.change: PhaseChange | None = None
        self.step = self.epoch = self.num_skipped = 0
        self.steps_in_epoch: int | None = None
        self.epoch_sums: Mapping[str, float] | None = None
        self.epoch_is_whole = True
        self.lr_schedule: LrScheduleState | None = None
        self.optimizer_state = OptimizerState()
        decay = setup.config.optim.ema_decay
        self.ema = None if decay is None else Ema(decay)
        self.best = BestWeights(phase.restore for phase in setup.phases)
        self.scores: dict[str, Scores] = {}
        self.record = RunRecord()
        self._train_s, self._started = 0.0, time.perf_counter()
        if not world.is_alone:
            # Each process drops other units than the others.
            seed_process(setup.config.seed, world.rank)

    # Where the run is

    @property
    def phase(self) -> Phase | None:
        """The phase that is active, or begins next; None once the run is over."""
        return self.setup.phases[self.phase_index] if self.phase_index < len(self.setup.phases) else None

    @property
    def phase_is_over(self) -> bool:
        return self.change is not None

    @property
    def steps_in_phase(self) -> int:
        return self.scheduler.state_dict()["steps"]

    @property
    def train_s(self) -> float:
        """Seconds of training and validation, without set-up, also before the run was resumed."""
        return self._train_s + time.perf_counter() - self._started

    def start_clock(self) -> None:
        self._started = time.perf_counter()
        self.record.begin_session(self.step, self.setup.device, self.tracker.url)

    def begin_phase(self, phase: Phase) -> None:
        """Once a phase, not when it is resumed: drops optimizer state that no phase needs any more."""
        if not phase.config.evaluate_only:
            left = [each for each in self.setup.phases[self.phase_index :] if not each.config.evaluate_only]
            self.optimizer_state.retain({name for each in left for name in each.freeze.plan.names.trainable})
            if phase.config.optimizer_state == "reset":
                self.optimizer_state.drop(phase.freeze.plan.names.trainable)
        self.in_phase, self.lr_schedule = True, None

    def begin_epoch(self) -> None:
        """A resumed epoch has begun already."""
        if self.steps_in_epoch is None:
            self.epoch, self.steps_in_epoch, self.epoch_sums = self.epoch + 1, 0, None

    def step_done(self, seconds: float, number: int = 1) -> None:
        """Counts steps, taken or left out, and the time since the last report; only the last one may end the phase."""
        assert self.steps_in_epoch is not None
        self.step, self.steps_in_epoch = self.step + number, self.steps_in_epoch + number
        self.change = self.scheduler.step_done(number) or self.scheduler.time_passed(seconds)

    def end_epoch(self, num_skipped: int, steps_per_epoch: int) -> None:
        """Ends an epoch, after all its steps or with its phase."""
        self.num_skipped += num_skipped
        # A phase may end with the last step of a pass; the pass is complete all the same.
        self.epoch_is_whole = self.steps_in_epoch == steps_per_epoch
        self.steps_in_epoch = None

    def validated(self, metrics: Mapping[str, float]) -> None:
        """Reports a completed pass over the training data, or an evaluation; a phase that is over stays as it ended."""
        if self.change is None:
            self.change = self.scheduler.epoch_done(metrics)

    def time_passed(self, seconds: float) -> None:
        """Reports the time since the last report, which may end the phase."""
        self.change = self.scheduler.time_passed(seconds)

    def new_best(self, metrics: Mapping[str, float]) -> list[str]:
        """The links of which the weights of this validation are the new best."""
        links, not_finite = self.best.record(metrics, self.step)
        for metric in not_finite:
            logger.warning(f"{metric} is {metrics[metric]} after step {self.step}: it does not count as best")
        return links

    def end_phase(self) -> None:
        """The next phase is up; `change` says which, and why."""
        assert self.change is not None
        self.record.phase_ended(self.change, self.step, self.epoch, self.train_s, self.features.saved.to_json())
        self.phase_index = len(self.setup.phases) if self.scheduler.index is None else self.scheduler.index
        self.in_phase, self.change, self.lr_schedule = False, None, None

    def results(self) -> dict[str, Any]:
        """The content of `results.json`."""
        best = {"score": self.best.score, "step": self.best.step}
        return self.record.to_json(self.setup, self.scores, best, self.train_s)

    # On disk

    def to_json(self, row: Mapping[str, Any], lr_schedule: LrScheduleState | None) -> dict[str, Any]:
        """Everything but tensors, as plain data; the keys of a checkpoint's `state.json`, version 2.

        Args:
            row: What was logged last.
            lr_schedule: The state of the active phase's learning-rate schedule, if it trains.
        """
        phase = self.setup.phases[self.phase_index]
        within = None
        if self.steps_in_epoch is not None:
            within = {
                "windows": self.steps_in_epoch,
                "batch_size": phase.batch_size,
                "accumulate": phase.optim.accumulate,
                "log": self.epoch_sums,
            }
        return {
            **row,
            "phase_index": self.phase_index,
            "step": self.step,
            "epoch": self.epoch,
            "num_skipped": self.num_skipped,
            "change": None if self.change is None else vars(self.change),
            "within_epoch": within,
            "freeze": [text_of(pattern) for pattern in phase.freeze.patterns],
            "scheduler": self.scheduler.state_dict(),
            "audit": self.audit.state_dict(),
            "scores": self.scores,
            "record": self.record.state_dict(),
            "train_s": self.train_s,
            "features": self.features.state_dict(),
            "metrics_bytes": self.tracker.flush_to_disk(),
            "wandb_id": self.tracker.wandb_id,
            "world_size": self.world.size,
            "history": self.history.to_json(),
            "config": self.setup.config.model_dump(mode="json", exclude_none=True),
            **provenance(),
            "phases": [each.name for each in self.setup.phases],
            "frozen": frozen_names(phase),
            "lr_schedule": lr_schedule,
            "best": self.best.state_dict(),
        }

    def tensors(self, statistics: Mapping[str, Tensor]) -> dict[str, Any]:
        """Everything with tensors in it but the model; every process has to call it, with the averages swapped in.

        Args:
            statistics: Of norm layers, as this process has them by itself inside an epoch.
        """
        own = {"random": random_state(self.setup.device), "statistics": dict(statistics)}
        return {
            "own": self._of_every_process(own),
            "scaler": self.scaler.state_dict(),
            "moments": self.optimizer_state.state_dict(),
            # Next to the averages, which are the model of the checkpoint, the weights as they train.
            "live": {} if self.ema is None else self.ema.averages(),
            "balance": [balance.state() for balance in self._balances()],
        }

    def restore(self, resumption: Resumption) -> None:
        """Restores a run as it was when it wrote a checkpoint; the checkpoint's weights are in the model already."""
        saved, tensors = resumption.state, resumption.memory
        self.phase_index, self.step, self.epoch = saved["phase_index"], saved["step"], saved["epoch"]
        self.num_skipped, self.in_phase = saved["num_skipped"], True
        self.change, self.lr_schedule = resumption.change, resumption.lr_schedule
        if (within := saved["within_epoch"]) is not None:
            self.steps_in_epoch, self.epoch_sums = int(within["windows"]), within["log"]
        self.scheduler.load_state_dict(saved["scheduler"])
        self.audit.load_state_dict(saved["audit"])
        self.scaler.load_state_dict(tensors["scaler"])
        self.features.load_state_dict(saved["features"])
        self.best.load_state_dict(saved["best"])
        self.record.load_state_dict(saved.get("record", {}))
        self.scores, self._train_s = saved["scores"], saved["train_s"]
        if resumption.in_place:
            self.tracker.cut_back(saved["metrics_bytes"])
        self.load_optimizer_state(tensors)
        for balance, memory in zip(self._balances(), tensors["balance"], strict=True):
            balance.load_state(memory, self.setup.device)
        self._restore_own(tensors["own"])

    def load_optimizer_state(self, tensors: Mapping[str, Any]) -> None:
        """Loads optimizer state, and the weights as they trained, if those in the model by now are averages."""
        self.optimizer_state.load_state_dict(tensors["moments"])
        live = tensors["live"]
        parameters = {name: self.setup.root.get_parameter(name) for name in live}
        if self.ema is not None:
            self.ema.load(parameters, {name: parameter.detach() for name, parameter in parameters.items()})
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(shard_like(parameter, live[name]))

    def averaged(self) -> AbstractContextManager[None]:
        """Puts the moving averages, if there are any, in the place of the trainable parameters."""
        return nullcontext() if self.ema is None else self.ema.swapped_in()

    def _restore_own(self, every: list[dict[str, Any]]) -> None:
        """Restores what each process has by itself; where there were fewer or more of them, it starts from scratch."""
        if len(every) != self.world.size:
            seed_process(self.setup.config.seed + self.step, self.world.rank)
            return
        own = every[self.world.rank]
        set_random_state(own["random"], self.setup.device)
        load_buffers(self.setup.root, own["statistics"])

    def _of_every_process(self, own: dict[str, Any]) -> list[dict[str, Any]]:
        if self.world.is_alone:
            return [own]
        states: list[Any] = [None] * self.world.size
        dist.all_gather_object(states, own)
        return states

    def _balances(self) -> Iterable[Balance]:
        return list(self.setup.root.get_submodule("balance").children())  # type: ignore[arg-type]
