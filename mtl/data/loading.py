"""Batches, made ahead of the steps that take them: by a thread here, or by torch's DataLoader in worker processes."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from mtl.data.augment import View
from mtl.data.dataset import Batch, Split
from mtl.data.orders import Order, Shuffled
from mtl.data.samplers import training_shares, validation_shares
from mtl.data.split_workers import SplitWorkers
from mtl.data.workers import ahead
from mtl.distributed.world import ALONE, World

_IN_PROCESS = SplitWorkers(0)


@dataclass(frozen=True)
class Loading:
    """How batches are made; the batches are the same, whatever it says.

    Attributes:
        with_images: Whether images are read with the labels; if not, they are when a batch is asked for them.
        device: Where batches are copied; they stay on the host if not given.
        workers: The processes that read what is stored; if there are none, this one does.
    """

    with_images: bool = False
    device: torch.device | None = None
    workers: SplitWorkers = _IN_PROCESS


IN_THREAD = Loading()
# Batches that are read at once where that takes no time, and the most bytes of their labels.
_MOST_IN_BLOCK, _BLOCK_BYTES = 32, 1 << 18


def training_batches(
    split: Split,
    batch_size: int,
    seed: int,
    epoch: int,
    view: View | None = None,
    world: World = ALONE,
    *,
    skip: int = 0,
    loading: Loading = IN_THREAD,
    order: Order | None = None,
) -> Generator[Batch, None, None]:
    """One epoch in random order: of every global batch this rank's share, in the order of `training_shares`.

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
        order: The order of the images; if not given, every image once, shuffled.

    Raises:
        ValueError: There are fewer batches than are to be skipped.
        WorldError: A global batch has fewer images than there are ranks.
        DataError: While it runs: a worker died.
    """
    # Not a generator itself, so that a mistake is raised by the call.
    shares = training_shares(order or Shuffled(len(split)), batch_size, seed, epoch, skip, world)
    return _load(split, shares, world.rank, view, loading)


def windows(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """Groups batches whose gradients make one step; the last group of an epoch may be smaller."""
    while window := list(islice(batches, size)):
        yield window


def validation_batches(split: Split, batch_size: int, loading: Loading = IN_THREAD) -> Generator[Batch, None, None]:
    """Every image once, in order."""
    for batch, _ in validation_rounds(split, batch_size, ALONE, loading):
        yield batch


def validation_rounds(
    split: Split, batch_size: int, world: World, loading: Loading = IN_THREAD
) -> Generator[tuple[Batch, bool], None, None]:
    """This rank's batches of `validation_shares`, and whether it is the one to count each."""
    rounds = list(validation_shares(len(split), batch_size, world))
    shares_of = [shares for shares, _ in rounds]
    read = _read if split.is_in_memory else partial(_load, loading=loading)
    with closing(read(split, shares_of, world.rank, None)) as batches:
        yield from zip(batches, [counts for _, counts in rounds], strict=True)


def batches_of(
    split: Split, parts: Sequence[Tensor], view: View | None, loading: Loading
) -> Generator[Batch, None, None]:
    """Batches of given images; what is in memory is read without processes.

    Args:
        split: The images and labels.
        parts: The indices of each batch, "b", int64.
        view: How the images are seen.
        loading: How batches are made.
    """
    own = replace(loading, workers=_IN_PROCESS) if split.is_in_memory else loading
    return _load(split, [[part] for part in parts], 0, view, own)


def _load(
    split: Split, shares_of: Sequence[Sequence[Tensor]], rank: int, view: View | None, loading: Loading
) -> Generator[Batch, None, None]:
    if not loading.with_images and _batches_in_block(split, shares_of) > 1:
        yield from _read(split, shares_of, rank, view, loading.device)
        return
    copier = _Copier(loading.device) if loading.device is not None and loading.device.type == "cuda" else None

    def make() -> Generator[tuple[Batch, torch.cuda.Event | None], None, None]:
        parts = [shares[rank] for shares in shares_of]
        if parts and loading.workers.num:
            rows = loading.workers.read(split, parts, view, loading.with_images)
        else:
            rows = (split.rows(part, loading.with_images, view) for part in parts)
        with closing(rows):
            for shares, stored in zip(shares_of, rows, strict=True):
                batch = split.batch(shares[rank], view, shares, stored)
                if copier is not None:
                    yield copier.start(batch)
                    continue
                batch = batch if loading.device is None else batch.to(loading.device)
                if loading.with_images:
                    _ = batch.images
                yield batch, None

    for batch, event in ahead(make()):
        if copier is not None and event is not None:
            copier.finish(batch, event)
        yield batch


def _batches_in_block(split: Split, shares_of: Sequence[Sequence[Tensor]]) -> int:
    """How many batches are worth reading at once: many small ones, in the time that handing one to a thread takes."""
    num_bytes = split.label_bytes()
    if num_bytes is None or not shares_of:
        return 1
    return min(_MOST_IN_BLOCK, _BLOCK_BYTES // max(1, num_bytes * sum(map(len, shares_of[0]))))


def _read(
    split: Split,
    shares_of: Sequence[Sequence[Tensor]],
    rank: int,
    view: View | None,
    device: torch.device | None = None,
) -> Generator[Batch, None, None]:
    """Batches of what is in memory, several at once where they are small."""
    num = max(1, _batches_in_block(split, shares_of))
    for first in range(0, len(shares_of), num):
        part = shares_of[first : first + num]
        if len(part) == 1:
            batch = split.batch(part[0][rank], view, part[0])
            yield batch if device is None else batch.to(device)
            continue
        block = split.batch(torch.cat([shares[rank] for shares in part]), view)
        yield from (block if device is None else block.to(device)).parts(part, rank)


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
