"""A run's checkpoints: when one is due, writing it, going back to the best one, and the links of a resumed run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mtl.checkpoint.folder import Checkpoints, SaveError
from mtl.checkpoint.load import load_checkpoint
from mtl.distributed.world import World
from mtl.model.fsdp import FullModel, gather_model
from mtl.phases.resolve import Phase
from mtl.runtime.console import logger
from mtl.runtime.signals import Stopped
from mtl.runtime.tensors import gathered, is_sharded
from mtl.training.phase import ActivePhase
from mtl.training.resume import Resumption
from mtl.training.setup import RunSetup
from mtl.training.state import RunState


class CheckpointWriter:
    """Writes the state of a run. With several processes, rank 0 writes, unless each writes its shards."""

    def __init__(self, setup: RunSetup, folder: Path, world: World) -> None:
        self._setup = setup
        self._world = world
        self._checkpoints = Checkpoints(folder, mends=world.is_main)
        self._is_sharded = any(is_sharded(parameter) for parameter in setup.root.parameters())
        self._in_shards = self._is_sharded and setup.config.distributed.checkpoint == "dcp"
        # Seconds of steps since the last one, by the clock of rank 0.
        self._waited_s = 0.0

    def is_due(self, step: int, seconds: float) -> bool:
        """Whether `checkpoint.every_steps` or `every_minutes` asks for one after a step inside an epoch.

        Args:
            step: Steps done in the run.
            seconds: Those since the step before, by the clock of rank 0.
        """
        settings = self._setup.config.checkpoint
        if settings.every_steps is not None and step % settings.every_steps == 0:
            return True
        if not settings.every_minutes:
            return False
        self._waited_s += seconds
        return self._waited_s >= 60 * settings.every_minutes

    def steps_left(self, step: int, most: int) -> int:
        """How many of the next steps come before one after which `checkpoint.every_steps` asks for a checkpoint.

        Args:
            step: Steps done in the run.
            most: No more than these are looked at.
        """
        every = self._setup.config.checkpoint.every_steps
        return most if every is None else min(most, every - step % every - 1)

    def write(
        self,
        state: RunState,
        active: ActivePhase,
        row: Mapping[str, Any],
        links: Sequence[str] = (),
        statistics: Mapping[str, Tensor] | None = None,
    ) -> Path:
        """Writes a checkpoint; if one process trains, it may still be written when this returns.

        Args:
            state: The run's.
            active: The active phase.
            row: What was logged last.
            links: What it is the new best by.
            statistics: Of norm layers, as this process has them by itself inside an epoch.

        Returns:
            Its folder.

        Raises:
            SaveError: The disk does not take it, or did not take the one before; those before are as they were.
        """
        world, root, optim = self._world, self._setup.root, active.optim
        if optim is not None:
            optim.keep_state(state)
        plain = state.to_json(row, None if optim is None else optim.lr_schedule.state_dict())
        every = self._setup.config.checkpoint.keep_every_epochs
        keep = every is not None and state.steps_in_epoch is None and optim is not None and state.epoch % every == 0
        frozen, names = plain["frozen"], ["last", *links]
        with state.averaged():
            tensors = state.tensors(statistics or {})
            if self._in_shards:
                self._checkpoints.save_shards(root, frozen, tensors, plain, names, world, keep)
            else:
                # Where the model is sharded, all processes gather the full tensors that rank 0 writes.
                full: nn.Module | FullModel = root
                if self._is_sharded:
                    full, tensors = gather_model(root, world), gathered(tensors, world.is_main)
                if world.is_main:
                    known = {} if self._is_sharded else state.audit.proven
                    self._checkpoints.save(full, frozen, tensors, plain, names, keep, known, world.is_alone)
        world.barrier()
        self._waited_s = 0.0
        return self._checkpoints.folder / "last"

    def wait(self) -> None:
        """Returns once the last one is on disk.

        Raises:
            SaveError: It cannot be written.
        """
        self._checkpoints.wait()

    @contextmanager
    def written(self) -> Iterator[None]:
        """Ends once all checkpoints that were begun inside are on disk.

        Raises:
            SaveError: One cannot be written. If a fault ended what is inside, that is raised, and this logged.
        """
        try:
            yield
        except Stopped:
            # It says that all is saved.
            self.wait()
            raise
        except BaseException:
            try:
                self.wait()
            except SaveError as error:
                logger.warning(str(error))
            raise
        self.wait()

    def load_best(self, state: RunState, phase: Phase) -> None:
        """Loads the best weights and buffers so far, with their optimizer state, if a phase begins with them."""
        if phase.restore is None:
            return
        metric, direction = phase.restore
        link = state.best.link(metric, direction)
        folder = self._checkpoints.find(link)
        if folder is None:
            logger.warning(f"{phase.name}: there are no best weights by {metric} yet; keeping the current ones")
            return
        saved, tensors = load_checkpoint(folder, self._setup.root)
        state.load_optimizer_state(tensors)
        step, value = saved["step"], saved["best"][link]["best"]["value"]
        logger.info(f"{phase.name}: back to the weights of step {step}, the best by {metric}: {value:.4g}")

    def relink(self, resumption: Resumption, state: RunState) -> None:
        """Makes links those of a resumed run: `last` and the best ones, copied if they are another run's."""
        if not self._world.is_main:
            self._world.barrier()
            return
        steps = state.best.steps
        if resumption.in_place:
            self._checkpoints.drop_newer(resumption.step)
            # A run that was killed between a checkpoint and its links has links to older ones.
            steps = {link: step for link, step in steps.items() if not self._checkpoints.is_at(link, step)}
        else:
            self._checkpoints.adopt(resumption.folder, resumption.step, "last")
        here = resumption.folder.resolve()
        for link, step in steps.items():
            source = here if step == resumption.step else here.parent / f"step-{step:08d}"
            if source.is_dir():
                self._checkpoints.adopt(source, step, link)
            else:
                state.best.forget(link)
                logger.warning(f"resume: the weights of step {step}, until then the {link}, are no longer there")
        self._world.barrier()
