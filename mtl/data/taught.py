"""A split some of whose labels are embeddings that teachers give of its images."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mtl.data.augment import View
from mtl.data.dataset import Batch, Rows, Split
from mtl.data.loading import Loading, batches_of
from mtl.data.wrapped import WrappedSplit
from mtl.distributed.world import World
from mtl.runtime.console import progress_bar
from mtl.runtime.fingerprint import fingerprint_of_json

# Constants are fitted on the embeddings of about this many images where none are kept.
_NUM_FITTED = 256


@dataclass(frozen=True)
class Teaching:
    """The teacher of a task.

    Attributes:
        embed: From images "b h w c" to embeddings "b k", float32, both on the run's device.
        width: k.
        digest: One of its weights.
    """

    embed: Callable[[Tensor], Tensor]
    width: int
    digest: str


class TaughtSplit(WrappedSplit):
    """Another split, with the embeddings of teachers among its labels.

    Where its images are the same in every epoch, `keep` computes the embeddings once, and no batch needs its images for
    them. Else those of each batch are computed with it, of the images as it shows them.
    """

    def __init__(self, split: Split, teachers: Mapping[str, Teaching], batch_size: int, loading: Loading) -> None:
        """Args:
        split: The images and all other labels.
        teachers: By task.
        batch_size: Images of which embeddings are computed at once where they are kept.
        loading: How images are read for that, and the device on which teachers are.
        """
        assert loading.device is not None
        super().__init__(split)
        self._teachers, self._batch_size = teachers, batch_size
        self._device, self._loading = loading.device, replace(loading, with_images=True)
        self._kept: dict[str, Tensor] | None = None
        self._active: Collection[str] = teachers

    def keep(self, world: World, quiet: bool) -> None:
        """Computes the embeddings of all images, once; each process computes those of some batches.

        Batches are the same with any number of processes, and so are the bits.

        Raises:
            DataError: An image cannot be read.
        """
        starts = range(self._batch_size * world.rank, len(self), self._batch_size * world.size)
        kept = self._embed([torch.arange(at, min(at + self._batch_size, len(self))) for at in starts], len(self), quiet)
        for embeddings in kept.values():
            world.sum_in_place(embeddings)
        self._kept = kept

    def _embed(self, parts: list[Tensor], num: int, quiet: bool) -> dict[str, Tensor]:
        """Embeddings of some images, by task "num k" on the host, 0 for the others."""
        found = {name: torch.zeros(num, teacher.width) for name, teacher in self._teachers.items()}
        with (
            progress_bar(sum(map(len, parts)), "computing embeddings", quiet) as bar,
            closing(batches_of(self._split, parts, None, self._loading)) as batches,
        ):
            for batch in batches:
                for name, teacher in self._teachers.items():
                    found[name][batch.indices] = teacher.embed(batch.images).cpu()
                bar.update(len(batch))
        return found

    def begin_phase(self, tasks: Collection[str]) -> None:
        super().begin_phase(tasks)
        self._active = [name for name in self._teachers if name in tasks]

    def rows(self, indices: Tensor, with_images: bool, view: View | None = None) -> Rows:
        return super().rows(indices, with_images or (self._kept is None and bool(self._active)), view)

    def batch(
        self,
        indices: Tensor,
        view: View | None = None,
        every: Sequence[Tensor] | None = None,
        rows: Rows | None = None,
    ) -> Batch:
        batch = replace(self._split.batch(indices, view, every, rows), split=self)
        if self._kept is not None:
            batch.labels.update({name: kept[indices] for name, kept in self._kept.items()})
            return batch
        if self._active:
            # The images stay with the batch, so that they are read and changed once.
            batch = batch.to(self._device)
            batch.labels.update({name: self._teachers[name].embed(batch.images) for name in self._active})
        return batch

    def label_bytes(self) -> None:
        """None: embeddings that are not kept take time."""

    @property
    def may_lack(self) -> bool:
        """True: a batch has the embeddings of active tasks alone."""
        return True

    def labels_to_fit(self, task: str) -> Tensor:
        if task not in self._teachers:
            return super().labels_to_fit(task)
        if self._kept is not None:
            return self._kept[task]
        chosen = torch.arange(len(self))[:: max(1, len(self) // _NUM_FITTED)]
        return self._embed(list(torch.split(chosen, self._batch_size)), len(self), quiet=True)[task][chosen]

    def label_identity(self, task: str) -> str | None:
        if task not in self._teachers:
            return super().label_identity(task)
        images = self.identity()
        return None if images is None else fingerprint_of_json([self._teachers[task].digest, images])
