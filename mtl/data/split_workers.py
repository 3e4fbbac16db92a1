"""The worker processes of a run: the same ones read every batch of a phase."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mtl.data.augment import View
from mtl.data.dataset import Rows, Split
from mtl.data.workers import Workers, read_by_workers


@dataclass(frozen=True)
class Request:
    """A batch to be read.

    Attributes:
        split: The place of the split among those that the workers know.
        indices: Of the images in the split.
        view: How they are seen.
        with_images: Whether images are read with the labels.
    """

    split: int
    indices: list[int]
    view: View | None
    with_images: bool


class SplitWorkers:
    """Processes that read what is stored of splits.

    Each reading has processes of its own; inside of `stay`, the same ones read again and again, which saves to fork
    them every epoch.

    Attributes:
        num: How many; 0 for none.
    """

    def __init__(self, num: int, splits: Sequence[Split] = ()) -> None:
        """Args:
        num: How many processes.
        splits: Those for which the processes stay.
        """
        self.num = num
        self._splits = tuple(splits)
        self._staying: Workers[Rows] | None = None
        self._is_reading = False

    @contextmanager
    def stay(self) -> Iterator[None]:
        """The splits do not change inside: the processes know them as they were when something was first read."""
        self._staying = Workers(RowsOfSplits(self._splits), self.num)
        try:
            yield
        finally:
            self._staying.close()
            self._staying = None

    def read(
        self, split: Split, parts: Sequence[Tensor], view: View | None, with_images: bool
    ) -> Generator[Rows, None, None]:
        """The rows of some batches, in order.

        Args:
            split: The images and labels.
            parts: The indices of each batch, "b", int64.
            view: How the images are seen.
            with_images: Whether to read the images too.

        Raises:
            DataError: A worker died.
        """
        # Random light is not the workers' affair, and large.
        seen = None if view is None else replace(view, light=None)
        place = next((place for place, own in enumerate(self._splits) if own is split), None)
        # Kept features are computed while a reading of labels runs.
        if self._staying is None or self._is_reading or place is None:
            alone = (Request(0, part.tolist(), seen, with_images) for part in parts)
            yield from read_by_workers(RowsOfSplits([split]), alone, min(self.num, len(parts)))
            return
        self._is_reading = True
        requests = (Request(place, part.tolist(), seen, with_images) for part in parts)
        try:
            with closing(self._staying.read(requests)) as rows:
                yield from rows
        finally:
            self._is_reading = False


class RowsOfSplits(Dataset[Rows]):
    """The rows of a whole batch at a time, for workers."""

    def __init__(self, splits: Sequence[Split]) -> None:
        self._splits = splits

    def __getitems__(self, request: Request) -> Rows:
        rows = self._splits[request.split].rows(torch.tensor(request.indices), request.with_images, request.view)
        # Shared here, where torch passes an error on to the main process. If memory ran out in the worker's thread that
        # sends the batch, the batch would be lost, and the main process would wait for it for ever.
        for tensor in [*rows.labels.values(), *([] if rows.images is None else [rows.images])]:
            tensor.share_memory_()  # type: ignore[no-untyped-call]
        return rows
