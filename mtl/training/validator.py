"""The validation of a run: all tasks after every epoch, those of which nothing trains once in a phase."""

from __future__ import annotations

import torch

from mtl.data import Loading
from mtl.distributed.world import World
from mtl.freeze import is_fully_frozen
from mtl.phases.metrics import SCORE
from mtl.phases.resolve import Phase
from mtl.training.features import FeatureSource
from mtl.training.setup import RunSetup
from mtl.training.step_sync import StepSync
from mtl.training.validation import Scores, score, validate


class Validator:
    """One for each run."""

    def __init__(
        self, setup: RunSetup, autocast: torch.autocast, features: FeatureSource, sync: StepSync, world: World
    ) -> None:
        self._setup = setup
        self._autocast = autocast
        self._features = features
        self._sync = sync
        self._world = world
        # Scores of the tasks of which nothing trains, from their one validation in the phase.
        self._constant_scores: Scores = {}

    def begin_phase(self) -> None:
        """Tasks of which nothing trains are measured once from here on."""
        self._constant_scores = {}

    def __call__(self, phase: Phase) -> tuple[Scores, dict[str, float]]:
        """Metrics of all tasks with labels, by task and name; and with `val/score` under the names of the log."""
        if not self._sync.holds:
            self._constant_scores.clear()
        setup, constant, plan = self._setup, self._constant_scores, phase.freeze.plan
        tasks = {name: task for name, task in setup.labelled.items() if name not in constant}
        fresh = validate(
            setup.model,
            tasks,
            setup.val,
            phase.batch_size,
            setup.device,
            self._autocast,
            self._features,
            self._world,
            Loading(not self._features.keeps, workers=setup.workers),
        )
        if is_fully_frozen(plan, "trunk"):
            constant |= {name: each for name, each in fresh.items() if is_fully_frozen(plan, f"heads.{name}")}
        scores = {name: (fresh | constant)[name] for name in setup.labelled}
        metrics = {f"val/{task}/{name}": value for task, values in scores.items() for name, value in values.items()}
        return scores, metrics | {SCORE: score(setup.labelled, scores, setup.trivial)}
