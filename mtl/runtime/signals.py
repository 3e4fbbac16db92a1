"""Signals that ask a program to end: raised before and after training; in training, the step is finished and saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any


class Stopped(Exception):  # noqa: N818  it is no error
    """A run that was asked to end, and has saved a checkpoint."""


def asking_signals() -> list[signal.Signals]:
    """SIGTERM (as Slurm sends it before it takes a machine back), SIGINT (Ctrl-C), and SIGHUP (a closed terminal).

    The last one only if it is not ignored already: `nohup` does that, to let a program live on.
    """
    is_kept_alive = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([] if is_kept_alive else [signal.SIGHUP])]


@contextmanager
def raised_signals() -> Iterator[None]:
    """Signals that ask the program to end are raised in the block as `KeyboardInterrupt` with their name.

    A second one ends the program at once, since the first one can be lost: Python drops what a destructor raises.
    """
    before: dict[signal.Signals, Any] = {}

    def raise_it(number: int, _: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        raise KeyboardInterrupt(signal.Signals(number).name)

    _set_handlers(before, raise_it)
    try:
        yield
    finally:
        _restore_handlers(before)


class Interrupt:
    """Records the signals that ask a run to end in a `with` block.

    The first one is only recorded. The second one acts as if there were no handler.

    Attributes:
        name: The signal that came; empty if none did.
    """

    def __init__(self, is_patient: bool = False) -> None:
        """Args:
        is_patient: Whether later ones are ignored: torchrun hands on to its processes what they may have got
            themselves, such as from Slurm, and kills them if they take too long.
        """
        self.name = ""
        self._is_patient = is_patient
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupt:
        _set_handlers(self._before, self._record)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _restore_handlers(self._before)

    def _record(self, number: int, _: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        if not self._is_patient:
            _restore_handlers(self._before)


def _set_handlers(before: dict[signal.Signals, Any], handler: Any) -> None:
    """Sets a handler for each of the signals, and puts those that were set into `before`."""
    # Python lets the main thread alone listen.
    if threading.current_thread() is threading.main_thread():
        for each in asking_signals():
            before[each] = signal.signal(each, handler)


def _restore_handlers(before: dict[signal.Signals, Any]) -> None:
    while before:
        each, handler = before.popitem()
        # None stands for a handler that was not set from Python, which Python cannot set again.
        signal.signal(each, signal.SIG_DFL if handler is None else handler)
