"""When the state of a run is written, and all that is in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler

from mtl.audit import GradientAudit
from mtl.distributed.world import World
from mtl.patterns import text_of
from mtl.phases.resolve import Phase
from mtl.phases.scheduler import PhaseChange, TaskScheduler
from mtl.runtime.provenance import provenance
from mtl.runtime.rng import random_state, seed_process, set_random_state
from mtl.runtime.signals import Stopped
from mtl.training.features import FeatureSource
from mtl.training.history import History
from mtl.training.keeper import Keeper, Stepping
from mtl.training.result import Outcome
from mtl.training.resume import Resumption, frozen_names
from mtl.training.setup import Parts
from mtl.training.step_sync import Consensus, put_back
from mtl.training.tracking.tracker import Tracker


@dataclass(frozen=True)
class Place:
    """Where a run stands: phase, steps and epochs done, steps that were left out."""

    phase_index: int
    step: int
    epoch: int
    num_skipped: int


@dataclass(frozen=True)
class Within:
    """Where in an epoch a run stands: steps done in it, how it counts them, and the sums of its log."""

    windows: int
    batch_size: int
    accumulate: int
    log: Mapping[str, float]


@dataclass
class Saver:
    """Writes what a run needs to go on as if it had not stopped. With several processes, the first one writes.

    Attributes:
        waited_s: Seconds of steps since it last did, by the clock of the first process.
    """

    parts: Parts
    keeper: Keeper
    tracker: Tracker
    scheduler: TaskScheduler
    audit: GradientAudit
    features: FeatureSource
    scaler: GradScaler
    outcome: Outcome
    consensus: Consensus
    world: World
    history: History
    waited_s: float = 0.0

    def is_time(self, step: int, is_last: bool) -> bool:
        """Whether to save after a step, inside an epoch.

        Args:
            step: Steps done in the run.
            is_last: Whether the epoch's validation comes next, which saves anyway.
        """
        if self.consensus.is_asked_to_end or is_last:
            return self.consensus.is_asked_to_end
        settings = self.parts.config.checkpoint
        if settings.every_steps is not None and step % settings.every_steps == 0:
            return True
        if not settings.every_minutes:
            return False
        self.waited_s += self.consensus.seconds
        return self.waited_s >= 60 * settings.every_minutes

    def save(
        self,
        place: Place,
        phase: Phase,
        stepping: Stepping | None,
        row: Mapping[str, Any],
        links: Sequence[str] = (),
        change: PhaseChange | None = None,
        within: Within | None = None,
        statistics: Mapping[str, Tensor] | None = None,
    ) -> Path:
        """Writes a checkpoint.

        Args:
            place: Where the run stands.
            phase: The active phase.
            stepping: What steps its parameters.
            row: What was logged last.
            links: What it is the new best by.
            change: The end of the phase, if it has come.
            within: Where in an epoch it is, if it is inside one.
            statistics: Of norm layers, as this process has them by itself inside an epoch.

        Raises:
            SaveError: The disk does not take it.
        """
        state = {
            **row,
            **asdict(place),
            "change": None if change is None else asdict(change),
            "within_epoch": None if within is None else asdict(within),
            "freeze": [text_of(pattern) for pattern in phase.freeze.patterns],
            "scheduler": self.scheduler.state_dict(),
            "audit": self.audit.state_dict(),
            "scores": self.outcome.scores,
            "train_s": self.outcome.seconds_so_far(),
            "features": self.features.state_dict(),
            "metrics_bytes": self.tracker.settle(),
            "wandb_id": self.tracker.wandb_id,
            "world_size": self.world.size,
            "history": self.history.to_json(),
            "config": self.parts.config.model_dump(mode="json", exclude_none=True),
            **provenance(),
        }
        every = self.parts.config.checkpoint.keep_every_epochs
        for_good = every is not None and within is None and stepping is not None and place.epoch % every == 0
        own = {"random": random_state(self.parts.device), "statistics": dict(statistics or {})}
        memory = {"own": self._of_every_process(own), "scaler": self.scaler.state_dict()}
        folder = self.keeper.save(state, memory, stepping, frozen_names(phase), links, for_good)
        self.waited_s = 0.0
        return folder

    def take_up_own(self, resumption: Resumption) -> None:
        """Puts what each process has by itself as it was; if there were fewer or more then, they begin anew."""
        every = resumption.memory["own"]
        if len(every) == self.world.size:
            own = every[self.world.rank]
            set_random_state(own["random"], self.parts.device)
            put_back(self.parts.root, own["statistics"])
        else:
            seed_process(self.parts.config.seed + resumption.step, self.world.rank)

    def end_if_asked(self, step: int) -> None:
        """Raises `Stopped` if the run was asked to end; what it has was saved just now."""
        if self.consensus.is_asked_to_end:
            raise Stopped(f"stopped by {self.consensus.reason_to_end} after step {step}; all is saved")

    def _of_every_process(self, own: dict[str, Any]) -> list[dict[str, Any]]:
        if self.world.is_alone:
            return [own]
        states: list[Any] = [None] * self.world.size
        dist.all_gather_object(states, own)
        return states
