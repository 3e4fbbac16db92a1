"""Batches, made ahead of the steps that take them: by a thread here, or by torch's DataLoader in worker processes."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from mtl.data.augment import View
from mtl.data.cache import DataError
from mtl.data.dataset import Batch, Rows, Split
from mtl.data.samplers import EpochSampler, validation_shares
from mtl.distributed.world import ALONE, World

THREAD_NAME = "mtl-batches"
# Batches that are ready before they are asked for: in the thread, and in each worker.
_NUM_AHEAD = 2

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Loading:
    """How batches are made; the batches are the same, whatever it says.

    Attributes:
        with_images: Whether images are read with the labels; if not, they are when a batch is asked for them.
        device: Where batches are copied; they stay on the host if not given.
        num_workers: Processes that read what is stored; 0 reads it in this one.
    """

    with_images: bool = False
    device: torch.device | None = None
    num_workers: int = 0


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
    """One epoch in random order: of every global batch this rank's share, in the order of `EpochSampler`.

    Batches are made in a thread, which ends when the generator is closed: when a loop over it is left, unless the
    generator has a name; then `contextlib.closing` ends it at once whatever happens.

    Args:
        split: The images and labels.
        batch_size: Images in one batch of all ranks together.
        seed: That of the run.
        epoch: Which epoch of the run, from 0.
        view: How the images are seen.
        world: The ranks, which share each batch.
        skip: Batches at the beginning of the epoch that are not made, since they were trained on already.
        loading: How batches are made.

    Raises:
        ValueError: There are fewer batches than are to be skipped.
        WorldError: A global batch has fewer images than there are ranks.
        DataError: While it runs: a worker died.
    """
    # Not a generator itself, so that a mistake is raised by the call.
    return _load(split, EpochSampler(len(split), batch_size, seed, epoch, skip, world), world.rank, view, loading)


def windows(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """Groups batches whose gradients make one step; the last group of an epoch may be smaller."""
    while window := list(islice(batches, size)):
        yield window


def validation_batches(split: Split, batch_size: int) -> Iterator[Batch]:
    """Every image once, in order."""
    for batch, _ in validation_rounds(split, batch_size, ALONE):
        yield batch


def validation_rounds(split: Split, batch_size: int, world: World) -> Iterator[tuple[Batch, bool]]:
    """This rank's batches of `validation_shares`, and whether it is the one to count each."""
    for shares, counts in validation_shares(len(split), batch_size, world):
        yield split.batch(shares[world.rank], every=shares), counts


def _load(
    split: Split, sampler: EpochSampler, rank: int, view: View | None, loading: Loading
) -> Generator[Batch, None, None]:
    copier = _Copier(loading.device) if loading.device is not None and loading.device.type == "cuda" else None

    def make() -> Generator[tuple[Batch, torch.cuda.Event | None], None, None]:
        num_workers = min(loading.num_workers, len(sampler))
        if num_workers:
            rows = _rows_by_workers(split, sampler, loading.with_images, num_workers)
        else:
            rows = (split.rows(shares[rank], loading.with_images) for shares in sampler.shares)
        with closing(rows):
            for shares, stored in zip(sampler.shares, rows, strict=True):
                batch = split.batch(shares[rank], view, shares, stored)
                if copier is not None:
                    yield copier.start(batch)
                    continue
                batch = batch if loading.device is None else batch.to(loading.device)
                if loading.with_images:
                    _ = batch.images
                yield batch, None

    for batch, event in _ahead(make()):
        if copier is not None and event is not None:
            copier.finish(batch, event)
        yield batch


class _RowsOfBatches(Dataset[Rows]):
    """What is stored of a whole batch at a time, for workers."""

    def __init__(self, split: Split, with_images: bool) -> None:
        self._split = split
        self._with_images = with_images

    def __getitems__(self, indices: list[int]) -> Rows:
        rows = self._split.rows(torch.tensor(indices), self._with_images)
        # Shared here, where torch passes an error on to the main process. If memory ran out in the worker's thread that
        # sends the batch, the batch would be lost, and the main process would wait for it for ever.
        for tensor in [*rows.labels.values(), *([] if rows.images is None else [rows.images])]:
            tensor.share_memory_()  # type: ignore[no-untyped-call]
        return rows


def _rows_by_workers(
    split: Split, sampler: EpochSampler, with_images: bool, num_workers: int
) -> Generator[Rows, None, None]:
    """What is stored of each batch, read in worker processes.

    Runs in another thread than the main one: in that, torch sets a handler of SIGCHLD, which raises in the middle of a
    step or of a checkpoint when a worker dies. Without the handler, torch looks at the workers every few seconds.

    Raises:
        DataError: A worker died. What a worker raises is raised here, with its traceback in the message.
    """
    loader = DataLoader(
        _RowsOfBatches(split, with_images),
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        # Forked: the memory of the split is shared, and nothing is copied.
        multiprocessing_context="fork",
        prefetch_factor=_NUM_AHEAD,
        worker_init_fn=_ignore_signals,
        # torch draws a seed for the workers: not from the generator that training draws from.
        generator=torch.Generator(),
    )
    batches: Any = iter(loader)
    # Not public, but nothing else knows how a worker ended.
    workers: list[BaseProcess] = batches._workers
    try:
        yield from batches
    except (RuntimeError, OSError, EOFError) as error:
        # A worker that dies closes its connections a moment before the system reports its end.
        ended = connection.wait([worker.sentinel for worker in workers], timeout=1.0)
        for number, worker in enumerate(workers):
            if worker.sentinel in ended:
                worker.join(1.0)
                raise DataError(
                    f"data worker {number} (pid {worker.pid}) {_end(worker.exitcode)} while it made a batch; if memory"
                    " ran out (see dmesg), lower data.num_workers or data.batch_size; data.num_workers=0 makes batches"
                    " without workers"
                ) from error
        raise
    finally:
        # This ends the workers, unless an exception still holds the iterator.
        del batches
        for worker in workers:
            worker.kill()
            worker.join()


def _as_it_is(rows: Any) -> Any:
    return rows


def _ignore_signals(_: int) -> None:
    """A signal that stops the run is for the main process, which ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def _end(code: int | None) -> str:
    if code is None:
        return "has closed its connections"
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _ahead(source: Generator[_Item, None, None]) -> Iterator[_Item]:
    """The items of a generator, which is run in a thread, some items ahead.

    What it raises is raised here, in its place. However this ends, the generator is closed and the thread has ended.
    """
    with closing(source):
        thread = ThreadPoolExecutor(1, THREAD_NAME)
        try:
            pending = deque(thread.submit(next, source, None) for _ in range(_NUM_AHEAD))
            while (item := pending.popleft().result()) is not None:
                pending.append(thread.submit(next, source, None))
                yield item
        finally:
            thread.shutdown(cancel_futures=True)


class _Copier:
    """Copies batches to a CUDA device on a stream of its own, while steps run there."""

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
