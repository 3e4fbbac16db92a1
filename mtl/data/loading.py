"""Batches of a pass over the data, made ahead of the steps that take them."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from mtl.data.augment import View
from mtl.data.dataset import Batch, Rows, Split
from mtl.data.workers import rows_by_workers
from mtl.distributed.world import ALONE, World

THREAD_NAME = "mtl-batches"
_NUM_AHEAD = 2

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Loading:
    """How batches are made; the batches are the same, whatever it says.

    Attributes:
        with_images: Whether images are read with the labels; if not, they are when a batch is asked for them.
        device: Where batches are brought; they stay on the host if not given.
        num_workers: Processes that read what is stored; 0 reads it in this one.
        num_ahead: Batches that are made, in a thread, before they are asked for; 0 makes each when it is asked for.
    """

    with_images: bool = False
    device: torch.device | None = None
    num_workers: int = 0
    num_ahead: int = _NUM_AHEAD


def training_batches(
    split: Split,
    batch_size: int,
    seed: int,
    epoch: int,
    view: View | None = None,
    world: World = ALONE,
    *,
    skip: int = 0,
    loading: Loading = Loading(),
) -> Generator[Batch, None, None]:
    """One pass in random order: of every global batch this process's share.

    The order depends on seed and epoch alone, so that a run can be taken up anywhere. A last batch that is not full is
    left out, another one each time: BatchNorm cannot train on one image.

    Batches are made in a thread, which ends when the generator is closed: when a loop over it is left, unless the
    generator has a name; then `contextlib.closing` ends it at once whatever happens.

    Args:
        split: The images and labels.
        batch_size: Images in one batch of all processes together.
        seed: That of the run.
        epoch: Which pass of the run, from 0.
        view: How the images are seen.
        world: The processes, which share each batch.
        skip: Batches at the beginning that are not made, since they were taken before.
        loading: How batches are made.

    Raises:
        ValueError: There are fewer batches than are to be skipped.
        WorldError: A global batch has fewer images than there are processes.
        DataError: While it runs: a worker process died.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(split), generator=generator)
    total = num_batches(len(split), batch_size)
    if not 0 <= skip <= total:
        raise ValueError(f"skip: expected 0 to {total}, the batches of a pass, got {skip}")
    whole = [order[number * batch_size : (number + 1) * batch_size] for number in range(skip, total)]
    every = [world.shares(indices) for indices in whole]
    return _load(split, every, world.rank, view, loading)


def num_batches(num_images: int, batch_size: int) -> int:
    """Batches in one training pass: full ones only, but at least one."""
    return max(1, num_images // batch_size)


def validation_batches(split: Split, batch_size: int) -> Iterator[Batch]:
    """Every image once, in order."""
    for batch, _ in validation_rounds(split, batch_size, ALONE):
        yield batch


def validation_rounds(split: Split, batch_size: int, world: World) -> Iterator[tuple[Batch, bool]]:
    """Every image once over all processes, in the batches of one process, dealt out in turn.

    All processes run equally many batches, since what they compute may need them all (FSDP, shared features).

    Returns:
        This process's batches, and whether it is the one to count them: a process for which the last round has none
        left runs the first one of that round again.
    """
    parts = [torch.arange(at, min(at + batch_size, len(split))) for at in range(0, len(split), batch_size)]
    for start in range(0, len(parts), world.size):
        dealt = parts[start : start + world.size]
        every = [*dealt, *[dealt[0]] * (world.size - len(dealt))]
        yield split.batch(every[world.rank], every=every), world.rank < len(dealt)


def _load(
    split: Split, every: Sequence[Sequence[Tensor]], rank: int, view: View | None, loading: Loading
) -> Generator[Batch, None, None]:
    """The batches of one process; `every` has the shares of all processes, batch by batch."""
    mine = [shares[rank] for shares in every]
    copier = _Copier(loading.device) if loading.device is not None and loading.device.type == "cuda" else None

    def make() -> Generator[tuple[Batch, torch.cuda.Event | None], None, None]:
        if loading.num_workers:
            rows = rows_by_workers(split, mine, loading.with_images, loading.num_workers)
        else:
            rows = _rows_here(split, mine, loading.with_images)
        for indices, shares, stored in zip(mine, every, rows, strict=True):
            batch = split.batch(indices, view, shares, stored)
            if copier is not None:
                yield copier.start(batch)
                continue
            batch = batch if loading.device is None else batch.to(loading.device)
            if loading.with_images:
                _ = batch.images
            yield batch, None

    for batch, event in _ahead(make(), loading.num_ahead):
        if copier is not None and event is not None:
            copier.finish(batch, event)
        yield batch


def _rows_here(split: Split, places: Sequence[Tensor], with_images: bool) -> Generator[Rows, None, None]:
    for indices in places:
        yield split.rows(indices, with_images)


def _ahead(source: Generator[_Item, None, None], num: int) -> Iterator[_Item]:
    """The items of a generator, which is run in a thread, so many ahead; 0 runs it here.

    What it raises is raised here, in its place. However this ends, the generator is closed and the thread has ended.
    """
    with closing(source):
        if num == 0:
            yield from source
            return
        thread = ThreadPoolExecutor(1, THREAD_NAME)
        try:
            pending = deque(thread.submit(next, source, None) for _ in range(num))
            while (item := pending.popleft().result()) is not None:
                pending.append(thread.submit(next, source, None))
                yield item
        finally:
            thread.shutdown(cancel_futures=True)


class _Copier:
    """Brings batches to a CUDA device on a stream of its own, beside the steps that run there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def start(self, batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        """Starts to copy a batch, with its images if they were read; any thread may call it."""
        with torch.cuda.stream(self._stream):
            batch = batch.to(self._device)
            if batch.stored is not None:
                _ = batch.images
            return batch, self._stream.record_event()

    def finish(self, batch: Batch, event: torch.cuda.Event) -> None:
        """Makes the caller's stream wait for the copy, and keeps the memory until that stream is done with it."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(event)
        for tensor in [*batch.labels.values(), *([] if batch.stored is None else [batch.stored, batch.images])]:
            tensor.record_stream(stream)
