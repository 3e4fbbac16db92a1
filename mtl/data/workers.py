"""Worker processes that read ahead, by torch's DataLoader, and the thread that runs what comes before a step."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import thread as futures_thread
from contextlib import closing, suppress
from multiprocessing import connection, context, queues
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset

from mtl.data.cache import DataError
from mtl.runtime.console import logger

THREAD_NAME = "mtl-batches"
# Batches that are ready before they are asked for: in the thread, and in each worker.
_NUM_AHEAD = 2

_Item = TypeVar("_Item")


class Workers(Generic[_Item]):
    """Worker processes that read batches of a data set, by torch's DataLoader; they stay from one reading to the next.

    They are forked when something is first read, and know the data set as it was then.
    """

    def __init__(self, dataset: Dataset[_Item], num: int) -> None:
        """Args:
        dataset: Its `__getitems__` makes a batch of a request.
        num: The processes.
        """
        self._dataset, self._num = dataset, num
        self._requests = _Requests()
        self._loader: DataLoader[_Item] | None = None
        self._processes: list[BaseProcess] = []
        self._is_reading = False

    def read(self, requests: Iterable[Any]) -> Generator[_Item, None, None]:
        """The data set's answer to each request, in order; one reading at a time.

        Runs in another thread than the main one: in that, torch sets a handler of SIGCHLD, which raises in the middle
        of a step or of a checkpoint when a worker dies. Without the handler, torch looks at the workers every few
        seconds.

        Raises:
            DataError: A worker died. What a worker raises is raised here, with its traceback in the message. After
                either, the processes are ended.
        """
        if died := self._ended():
            for number in died:
                logger.warning(f"{self._end_of(number)} while it waited; all of them are started again")
            self.close()
        if self._loader is None:
            self._loader = self._make_loader()
        self._requests.now, self._is_reading = requests, True
        try:
            # What a reading that was left has asked for comes first, and is thrown away.
            batches: Any = iter(self._loader)
            # Not public, but nothing else knows how a worker ended.
            self._processes = batches._workers
            yield from batches
            self._is_reading = False
        except Exception as error:
            # A worker that dies closes its connections a moment before the system reports its end.
            died = self._ended(timeout=1.0) if isinstance(error, RuntimeError | OSError | EOFError) else []
            ends = [self._end_of(number) for number in died]
            is_killed = bool(died) and self._processes[died[0]].exitcode == -signal.SIGKILL
            # The iterator is held by the error, so that torch does not end the workers.
            self.close()
            if ends:
                memory = "if memory ran out (see dmesg), lower data.num_workers or data.batch_size; "
                raise DataError(
                    f"{ends[0]} while it made a batch; {memory if is_killed else ''}data.num_workers=0 makes batches"
                    " without workers"
                ) from error
            raise

    def close(self) -> None:
        """Ends the processes."""
        # Idle ones end by themselves as the loader goes. For one in the middle of a read, torch would wait for seconds;
        # and where memory ran out, it may not be able to start the thread that would tell a worker.
        if self._is_reading:
            for process in self._processes:
                process.kill()
            with suppress(RuntimeError):
                _shut_down(self._loader)
        self._loader = None
        for process in self._processes:
            process.kill()
            process.join()
        self._processes = []

    def _make_loader(self) -> DataLoader[_Item]:
        return DataLoader(
            self._dataset,
            batch_sampler=self._requests,
            num_workers=self._num,
            collate_fn=_as_it_is,
            # Forked: the memory of the data set is shared, and nothing is copied.
            multiprocessing_context=_Fork(),
            prefetch_factor=_NUM_AHEAD,
            worker_init_fn=_begin,
            # torch draws a seed for the workers: not from the generator that training draws from.
            generator=torch.Generator(),
            persistent_workers=True,
        )

    def _ended(self, timeout: float = 0.0) -> list[int]:
        """The numbers of the processes that have ended."""
        ended = connection.wait([process.sentinel for process in self._processes], timeout)
        return [number for number, process in enumerate(self._processes) if process.sentinel in ended]

    def _end_of(self, number: int) -> str:
        process = self._processes[number]
        process.join(1.0)
        return f"data worker {number} (pid {process.pid}) {_end(process.exitcode)}"


def read_by_workers(dataset: Dataset[_Item], requests: Iterable[Any], num_workers: int) -> Generator[_Item, None, None]:
    """As `Workers.read`, once: the processes end with it."""
    with closing(Workers(dataset, num_workers)) as workers:
        yield from workers.read(requests)


def _shut_down(loader: Any) -> None:
    # Not public: left to the iterator's destructor, an error of it would be printed whenever that runs.
    if loader is not None and loader._iterator is not None:
        loader._iterator._shutdown_workers()


class _Requests:
    """The requests of the reading that runs, for a DataLoader that outlives it."""

    now: Iterable[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.now)


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
    # A signal that stops the run is for the main process, which ends its workers once the step is done and saved; a
    # terminal, `timeout` and Slurm send it to all processes of a group.
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
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
