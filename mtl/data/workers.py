"""Worker processes that read ahead, by torch's DataLoader, and the thread that runs what comes before a step."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import thread as futures_thread
from contextlib import closing
from multiprocessing import connection, context, queues
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset

from mtl.data.cache import DataError

THREAD_NAME = "mtl-batches"
# Batches that are ready before they are asked for: in the thread, and in each worker.
_NUM_AHEAD = 2

_Item = TypeVar("_Item")


def read_by_workers(
    dataset: Dataset[_Item], batches_of: Iterable[list[int]], num_workers: int
) -> Generator[_Item, None, None]:
    """What a data set's `__getitems__` makes of each batch of indices, in order, in worker processes.

    Runs in another thread than the main one: in that, torch sets a handler of SIGCHLD, which raises in the middle of a
    step or of a checkpoint when a worker dies. Without the handler, torch looks at the workers every few seconds.

    Raises:
        DataError: A worker died. What a worker raises is raised here, with its traceback in the message.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=batches_of,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        # Forked: the memory of the data set is shared, and nothing is copied.
        multiprocessing_context=_Fork(),
        prefetch_factor=_NUM_AHEAD,
        worker_init_fn=_begin,
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


class _Queue(queues.Queue):  # type: ignore[type-arg]
    """A queue to or from a worker, which sends the error in place of an item that cannot be sent.

    A queue drops such an item (too little memory to pickle it, something that cannot be pickled), and says so only on
    standard error: torch would wait for the batch forever.
    """

    def _on_queue_feeder_error(self, error: Exception, item: Any) -> None:
        if isinstance(item, tuple) and not isinstance(item[1], ExceptionWrapper):
            unsent: Any = ExceptionWrapper
            self.put((item[0], unsent((type(error), error, error.__traceback__), "while it sent a batch")))
        elif multiprocessing.parent_process() is not None:
            os._exit(1)  # A worker from which nothing can be sent any more: its end is noticed.


class _Fork(context.ForkContext):
    def Queue(self, maxsize: int = 0) -> queues.Queue[Any]:  # noqa: N802
        return _Queue(maxsize, ctx=self)


def _as_it_is(rows: Any) -> Any:
    return rows


def _begin(_: int) -> None:
    # A signal that stops the run is for the main process, which ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # The thread of the pool in `ahead`, in which a worker is forked, is its only one. At its end it would wait for the
    # pool's threads, itself among them, and fail, which torch reports wherever it looks at workers.
    threads: Any = futures_thread._threads_queues
    threads.clear()


def _end(code: int | None) -> str:
    if code is None:
        return "has closed its connections"
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def ahead(source: Generator[_Item, None, None]) -> Iterator[_Item]:
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
