"""Signals that ask a run to end: it is let finish its step and save what it has."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Stopped(Exception):  # noqa: N818  it is no error
    """A run that was asked to end, and has saved where it stands."""


class Interrupt:
    """Takes note of SIGTERM (as Slurm sends it before it takes a machine back) and SIGINT (Ctrl-C) in a `with` block.

    The first one is only noted. The second one acts as if nobody took note.

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
        # Python lets the main thread alone listen.
        if threading.current_thread() is threading.main_thread():
            for each in (signal.SIGTERM, signal.SIGINT):
                self._before[each] = signal.signal(each, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, _: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        if not self._is_patient:
            self._restore()

    def _restore(self) -> None:
        while self._before:
            each, handler = self._before.popitem()
            # None stands for a handler that was not set from Python, which Python cannot set again.
            signal.signal(each, signal.SIG_DFL if handler is None else handler)
