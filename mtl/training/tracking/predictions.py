"""Predictions of a few validation images, shown at a cadence."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from mtl.data import Batch
from mtl.distributed.world import World
from mtl.model.trunk import Features, in_eval_mode
from mtl.runtime.console import first_line, logger
from mtl.runtime.rng import rng_unchanged
from mtl.runtime.tensors import is_sharded
from mtl.training.autotune import autocast_for
from mtl.training.setup import RunSetup
from mtl.training.tracking.panel import draw_panel
from mtl.training.tracking.tracker import Tracker

_NUM_IMAGES = 4


class PredictionLog:
    """Shows predictions next to labels after a validation, on rank 0, if the backend shows pictures."""

    def __init__(self, tracker: Tracker, setup: RunSetup, world: World) -> None:
        self._tracker = tracker
        self._setup = setup
        self._every_epochs = setup.config.tracking.predictions_every_epochs if world.is_main else 0
        # A sharded model runs in all processes or in none.
        self._is_off = any(is_sharded(parameter) for parameter in setup.root.parameters())
        self._batch: Batch | None = None

    def after_validation(self, epoch: int, step: int, encode: Callable[[Batch], Features]) -> None:
        """Shows predictions if it is time; call it with the weights that were validated.

        Args:
            epoch: The number of the last epoch.
            step: Steps done in the run.
            encode: Gives what the heads read of the trunk.
        """
        if self._is_off or not self._every_epochs or epoch % self._every_epochs or not self._tracker.shows_pictures:
            return
        try:
            picture = self._draw(encode)
        except Exception as error:  # noqa: BLE001 - a task of the user's own may raise anything; no run ends for a picture
            self._is_off = True
            logger.warning(f"predictions are no longer shown: they cannot be drawn ({first_line(error)})")
            return
        self._tracker.log_picture("val/predictions", lambda: picture, step)

    def _draw(self, encode: Callable[[Batch], Features]) -> bytes:
        setup = self._setup
        # Compiled code is for batches of the run's size.
        eager: AbstractContextManager[Any] = nullcontext()
        if setup.config.compile:
            eager = torch.compiler.set_stance("force_eager")
        with rng_unchanged(setup.device), in_eval_mode(setup.model), torch.no_grad(), eager:
            if self._batch is None:
                self._batch = setup.val.batch(setup.val.examples(_NUM_IMAGES))
            with autocast_for(setup.config.precision, setup.device):
                outputs = setup.model.decode(encode(self._batch.to(setup.device)), self._batch.size)
        return draw_panel(self._batch, {name: each.float().cpu() for name, each in outputs.items()}, setup.labelled)
