"""The dividend: features of the frozen part of the trunk are computed once for each image, and read afterwards."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mtl.audit import PhaseRecord
from mtl.data import Batch, Loading, Split, View, batches_of, draw_view
from mtl.distributed.world import ALONE, World
from mtl.featurestore import FeatureStore
from mtl.featurestore.sharded import ShardedStore, batches_to_fill
from mtl.model.prefix import Prefix, PrefixError
from mtl.model.trunk import Features
from mtl.phases.resolve import Phase
from mtl.phases.reuse import num_passes, num_views, why_not_kept
from mtl.runtime.console import logger, progress_bar
from mtl.runtime.tensors import aligned
from mtl.runtime.text import count, in_bytes
from mtl.training.features.count import KeptCount
from mtl.training.features.key import feature_key
from mtl.training.features.probe import NotKept, probe_prefix
from mtl.training.features.stores import FeatureStores, as_computed, as_stored
from mtl.training.setup import RunSetup

# What reading is taken to cost, bytes a second, where it is not worth a measurement.
_READ_RATE = {"ram": 2e9, "disk": 5e8}


class FeatureSource:
    """The features of each phase, computed or kept.

    Kept features are served only as long as the audit holds the contract under which they were computed. With several
    ranks, each keeps a part, and all decide the same.

    Attributes:
        kept_in: Where the phase's activations are kept: `ram`, `disk`, or `off`.
        saved: What that saved in the phase, or in the one before until another is entered.
    """

    def __init__(self, setup: RunSetup, autocast: torch.autocast, quiet: bool, world: World = ALONE) -> None:
        self._setup = setup
        self._model = setup.model
        self._settings = setup.config.cache
        self._num_views = num_views(setup.config)
        self._autocast = autocast
        self._quiet = quiet
        self._world = world
        self._holds: Callable[[], bool] = lambda: False
        self._batch_size = setup.config.data.batch_size
        self._prefix: Prefix | None = None
        self.kept_in = "off"
        self.saved = KeptCount()
        # What `auto` decided in a phase that is resumed, until that is entered.
        self._resumed_in: str | None = None
        self._stores = FeatureStores(setup, self._num_views, world)
        # Splits by identity, and the first rows of views.
        self._filled: set[tuple[int, int]] = set()

    @property
    def keeps(self) -> bool:
        """Whether the phase's activations are kept."""
        return self._prefix is not None

    def view(self, epoch: int) -> View | None:
        """How the training images are seen in an epoch of the run, counted from 0."""
        config = self._setup.config
        number = epoch if self._settings.views is None else epoch % self._settings.views
        return draw_view(config.data, config.seed, number, len(self._setup.train))

    @property
    def trunk_rests(self) -> bool:
        """Whether the trunk is not run at all."""
        return self._prefix is not None and not self._prefix.modules

    def state_dict(self) -> dict[str, Any]:
        """The decision for the phase, and which features are in memory, as plain data; not the features."""
        return {"kept_in": self.kept_in, "in_memory": self._stores.state_dict(), "saved": self.saved.to_json()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Opens stores for the features that the interrupted run had in memory, so that later phases decide the same.

        The stores are empty; features are computed again when they are first needed.
        """
        self._resumed_in, self.saved = state["kept_in"], KeptCount.from_json(state.get("saved", {}))
        self._stores.load_state_dict(state["in_memory"])

    def enter(
        self,
        index: int,
        record: PhaseRecord,
        holds: Callable[[], bool],
        steps_done: int,
    ) -> None:
        """Decides whether and where to keep activations of a phase, and logs it.

        Args:
            index: The place of the phase, whose freeze is in force.
            record: The audit's, with the fingerprints of what is frozen.
            holds: Whether the audit has found nothing wrong so far.
            steps_done: Steps of the phase that were taken already.
        """
        phase, kept_in = self._setup.phases[index], self._resumed_in
        self.leave()
        if not steps_done:
            self.saved = KeptCount()
        self._setup.train.begin_phase(phase.tasks)
        self._batch_size, self._holds = phase.batch_size, holds
        mode = phase.config.cache or self._settings.mode
        if mode == "auto" and kept_in is not None:
            mode = kept_in  # type: ignore[assignment]
        if mode == "off":
            return
        # Each view of an image is another image.
        passes = num_passes(self._setup.phases[index:], steps_done) / self._num_views
        try:
            # Features that an earlier phase left in memory may pay for a single epoch; and a phase that is resumed
            # continues as it began, however little is left of it.
            pays = self._stores.are_in_memory or kept_in is not None
            why_not = why_not_kept(self._setup.config, phase, math.inf if pays else passes)
            if why_not:
                raise NotKept(why_not)
            prefix, seconds, is_exact = self._probe(phase)
            key = feature_key(self._setup, prefix, record, self._num_views, phase.batch_size)
            # Seconds are not the same on every rank; those of rank 0 count.
            seconds = self._world.broadcast(seconds)
            chosen = self._choose(prefix, mode, passes, seconds, key)
            if not self._stores.open(prefix, chosen, key):
                raise NotKept("the disk cannot hold it; see the warning above")
        except (NotKept, PrefixError) as reason:
            self.leave()
            logger.info(f"features: not kept: {reason}")
            return
        self._prefix, self.kept_in = prefix, chosen
        self.saved.kept_in, self.saved.modules = chosen, len(prefix.modules)
        self.saved.image_s = seconds / min(phase.batch_size, len(self._setup.train))
        what = f"the first {count(len(prefix.modules), 'module')} of the trunk" if prefix.modules else "the trunk"
        size, num_images = in_bytes(self._stores.num_bytes(prefix)), len(self._setup.train) + len(self._setup.val)
        logger.info(
            f"features: {what} computed once, in {1e3 * seconds:.1f} ms a batch, and kept"
            f" {'in memory' if chosen == 'ram' else 'on disk'}: {size} for {num_images} images"
            + ("" if is_exact else "; not bit-exact: this kernel's result depends on batch position")
        )

    def _probe(self, phase: Phase) -> tuple[Prefix, float, bool]:
        """The prefix that can be kept, its seconds for a batch, and whether it is exact at every batch position.

        Raises:
            NotKept, PrefixError: Nothing can.
        """
        if self._setup.config.distributed.strategy == "fsdp2" and not self._world.is_alone:
            raise NotKept("the trunk is sharded over the ranks (fsdp2)")
        with self._autocast:
            first = torch.arange(min(phase.batch_size, len(self._setup.train)))
            found = probe_prefix(self._model, self._images(self._setup.train, first), self._setup.labelled)
        if why_not := self._model.why_not_cut(found[0], phase.tasks, self._setup.labelled):
            raise NotKept(why_not)
        return found

    def leave(self) -> None:
        """Ends a phase: no kept features are served until the next one is entered."""
        self._stores.close()
        self._prefix, self._filled, self.kept_in, self._resumed_in = None, set(), "off", None

    def __call__(self, batch: Batch, tasks: Collection[str] | None = None) -> Features:
        """The features that the heads of some tasks read for a batch, and maybe more.

        Args:
            batch: Of the training or the validation split.
            tasks: The tasks; all if not given.
        """
        if self._prefix is not None and not self._holds():
            logger.warning("features: no longer kept, since the audit found the contract broken")
            self.leave()
            self._stores.clear()
        if self._prefix is None:
            return self._model.encode(batch.images, tasks)
        store, prefix, device = self._stores.of(batch.split), self._prefix, self._setup.device
        self.saved.num_read += len(batch)
        first = _first_row(batch)
        rows, filled = batch.indices + first, (id(batch.split), first)
        if isinstance(store, ShardedStore):
            if filled not in self._filled:
                self._filled.add(filled)
                self._fill(batch.split, batch.view, store, prefix)
            assert batch.every is not None, "every process takes part"
            every = [indices + first for indices in batch.every]
            again = partial(self._compute_again, batch.split, batch.view, first, prefix)
            shared = store.read_every(every, again, device)
            return prefix.replay(as_computed(shared, prefix, device))
        kept = store.read(rows)
        if kept is None and filled not in self._filled:
            self._filled.add(filled)
            self._fill(batch.split, batch.view, store, prefix)
            kept = store.read(rows)
        if kept is None:  # the disk is full, or the entry is damaged; the store has warned of it
            self.saved.num_read -= len(batch)
            features, kept = prefix.run(self._model.prepare(batch.images))
            store.write(rows, as_stored(kept, prefix))
            return features
        return prefix.replay(as_computed(kept, prefix, device))

    def several(self, batches: Sequence[Batch]) -> list[Features]:
        """The features of some batches of one split in one view, read at once where they are kept."""
        prefix, sizes = self._prefix, [len(batch) for batch in batches]
        kept = self._kept(batches[0], torch.cat([batch.indices for batch in batches]))
        if prefix is None or kept is None:
            return [self(batch) for batch in batches]
        self.saved.num_read += sum(sizes)
        parts = [torch.split(each, sizes) for each in kept]
        return [prefix.replay(list(map(aligned, own))) for own in zip(*parts, strict=True)]

    def peek(self, batch: Batch) -> Features:
        """The features of a batch of this process alone: kept ones if it has them; none are written or exchanged."""
        prefix, kept = self._prefix, self._kept(batch, batch.indices)
        return self._model.encode(batch.images) if prefix is None or kept is None else prefix.replay(kept)

    def _kept(self, batch: Batch, indices: Tensor) -> list[Tensor] | None:
        """The stored features of a batch's images in its view; None if this process does not have all of them."""
        if self._prefix is None or not self._holds():
            return None
        store = self._stores.of(batch.split)
        kept = None if isinstance(store, ShardedStore) else store.read(indices + _first_row(batch))
        return None if kept is None else as_computed(kept, self._prefix, self._setup.device)

    @property
    def bytes_per_image(self) -> int:
        """The features that heads read of an image, if the trunk is not run at all."""
        return 0 if self._prefix is None else self._prefix.bytes_per_image

    def _compute_again(self, split: Split, view: View | None, first: int, prefix: Prefix, rows: Tensor) -> list[Tensor]:
        """Features of rows of this rank that its store does not have."""
        # Tensors made in inference mode could not be used in training.
        with torch.inference_mode(mode=False), torch.no_grad():
            return as_stored(prefix.compute(self._images(split, rows - first, view)), prefix)

    def _choose(self, prefix: Prefix, mode: str, passes: float, seconds: float, key: dict[str, Any]) -> str:
        """`ram` or `disk`.

        Raises:
            NotKept: Neither, and why.
        """
        size, settings = self._stores.num_bytes(prefix), self._settings
        place = mode if mode != "auto" else "ram" if size <= 1e9 * settings.ram_gb else "disk"
        limit = 1e9 * (settings.ram_gb if place == "ram" else settings.disk_gb)
        if size > limit:
            raise NotKept(f"{in_bytes(size)} are more than cache.{place}_gb allows ({in_bytes(int(limit))})")
        if mode == "auto" and not self._stores.has(self._setup.train, key):
            read = prefix.bytes_per_image * self._batch_size / _READ_RATE[place]
            if seconds + passes * read > 0.95 * passes * seconds:
                raise NotKept(
                    f"it would save too little: {1e3 * seconds:.1f} ms to compute a batch, some {1e3 * read:.1f} ms to"
                    f" read {in_bytes(prefix.bytes_per_image * self._batch_size)}, in {passes:.3g} passes over the data"
                )
        return place

    def _fill(self, split: Split, view: View | None, store: FeatureStore, prefix: Prefix) -> None:
        """Computes the features of every image of a split, in batches of the sizes that training and validation use.

        Training batches are all full; the last one of validation may be smaller.
        """
        started = time.perf_counter()
        first = 0 if view is None else view.number * len(split)
        keeps_last = split is not self._setup.train
        batches = batches_to_fill(first, len(split), self._batch_size, keeps_last, self._world)
        with (
            progress_bar(len(split), "computing features", self._quiet) as bar,
            # Tensors made in inference mode could not be used in training.
            torch.inference_mode(mode=False),
            torch.no_grad(),
        ):
            loading = Loading(True, self._setup.device, self._setup.workers)
            with closing(batches_of(split, list(batches), view, loading)) as read:
                for batch in read:
                    computed = prefix.compute(self._model.prepare(batch.images))
                    store.write(first + batch.indices, as_stored(computed, prefix))
                    if store.is_disabled:
                        return
                    self.saved.num_computed += len(batch)
                    bar.update(len(batch) * self._world.size)
        self.saved.compute_s += time.perf_counter() - started

    def _images(self, split: Split, indices: Tensor, view: View | None = None) -> Tensor:
        return self._model.prepare(split.batch(indices, view).to(self._setup.device).images)


def _first_row(batch: Batch) -> int:
    """The row of the first image of a batch's split, in its view."""
    return 0 if batch.view is None else batch.view.number * len(batch.split)
