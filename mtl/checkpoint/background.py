"""Work that runs in a thread next to the steps: one piece at a time, and what it raises is raised to whoever waits."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    """A thread of its own for each piece of work; the interpreter does not end before it has."""

    def __init__(self) -> None:
        self._running: Future[None] | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Starts a piece of work once the one before has ended; raises what that has raised."""
        self.wait()
        thread = ThreadPoolExecutor(1, "mtl-checkpoint")
        self._running = thread.submit(work)
        # Ends with the work.
        thread.shutdown(wait=False)

    def wait(self) -> None:
        """Returns once nothing runs; raises what the last piece of work has raised, once."""
        running, self._running = self._running, None
        if running is not None:
            running.result()
