"""Reads what is stored of batches in worker processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch
from torch import Tensor
from torch.multiprocessing.reductions import init_reductions

from mtl.data.cache import DataError
from mtl.data.dataset import Rows, Split

_NUM_AHEAD = 2
# How often a worker looks whether the process that it works for is still there.
_LOOK_S = 5.0


class _Worker:
    """One process, and the one pipe to it: if it dies, even in the middle of a message, the pipe says so.

    torch's DataLoader has one queue for all workers, on which the reader waits for ever if a worker is killed while it
    writes.
    """

    def __init__(self, number: int, split: Split, with_images: bool) -> None:
        self.number = number
        # Forked: the memory of the split is shared, and nothing is copied.
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(
            target=_work, args=(theirs, split, with_images), name=f"mtl-data-{number}", daemon=True
        )
        self.process.start()
        # Here, it would keep the pipe open when the process is gone.
        theirs.close()

    def ask(self, places: Tensor) -> None:
        with suppress(OSError):  # it is dead; `answer` says so
            self.pipe.send(places.tolist())

    def answer(self) -> Rows:
        """Raises `DataError` if it died; and what it raised itself."""
        try:
            answer: Rows | Exception = self.pipe.recv()
        except (EOFError, OSError) as error:
            self.process.join(1.0)
            raise DataError(
                f"data worker {self.number} (pid {self.process.pid}) {_end(self.process.exitcode)} while it made a"
                " batch; if memory ran out (see dmesg), lower data.num_workers or data.batch_size; data.num_workers=0"
                " makes batches without workers"
            ) from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def end(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.join()


def rows_by_workers(
    split: Split, places: Sequence[Tensor], with_images: bool, num_workers: int
) -> Generator[Rows, None, None]:
    """What is stored at these places, in order, two batches ahead for each worker.

    Args:
        split: The images and labels.
        places: Those of each batch.
        with_images: Whether images are read too.
        num_workers: Processes, at most one for each batch.

    Raises:
        DataError: A worker died. What a worker raises is raised here.
    """
    workers: list[_Worker] = []
    try:
        workers += [_Worker(number, split, with_images) for number in range(min(num_workers, len(places)))]
        asked: deque[_Worker] = deque()
        for number, each in enumerate(places):
            worker = workers[number % len(workers)]
            worker.ask(each)
            asked.append(worker)
            if len(asked) > _NUM_AHEAD * len(workers):
                yield asked.popleft().answer()
        while asked:
            yield asked.popleft().answer()
    finally:
        for worker in workers:
            worker.end()


def _work(pipe: Connection, split: Split, with_images: bool) -> None:
    """What a worker does until its pipe is closed, or the process that it works for is gone."""
    # Whoever stops the run stops the main process, which ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    init_reductions()  # type: ignore[no-untyped-call]  # tensors are sent as shared memory
    parent = os.getppid()
    with suppress(EOFError, OSError):
        while True:
            while not pipe.poll(_LOOK_S):
                if os.getppid() != parent:
                    return
            places = torch.tensor(pipe.recv(), dtype=torch.int64)
            try:
                pipe.send(split.rows(places, with_images))
            except Exception as error:  # noqa: BLE001  it is raised where the batch was asked for
                pipe.send(error)


def _end(code: int | None) -> str:
    if code is None:
        return "has closed its pipe"
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
