"""Tracking: the numbers to `metrics.jsonl`, always, and to what shows the run, if it can be had."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mtl.config import TrackingConfig
from mtl.config.own import checked_options, is_own
from mtl.runtime.best import Direction
from mtl.runtime.console import first_line, logger
from mtl.training.tracking.backend import BestCheckpoint, Row, Table, TrackedRun, TrackingBackend
from mtl.training.tracking.choice import backend_class
from mtl.training.tracking.metrics_file import MetricsFile


class Tracker:
    """Logs rows of numbers. Nothing that a backend does ends a run.

    Attributes:
        message: Where the run is shown, in one line.
        is_less: Whether that is less than what was asked for, or could be had.
    """

    def __init__(
        self,
        config: TrackingConfig,
        run_dir: Path,
        name: str,
        run_config: Mapping[str, Any],
        wandb_id: str | None = None,
        is_silent: bool = False,
        directions: Mapping[str, Direction | None] | None = None,
        step: int = 0,
    ) -> None:
        """Args:
            config: How to track.
            run_dir: Where `metrics.jsonl` and a backend's files go; it exists.
            name: The run's name.
            run_config: The resolved configuration, shown by the backend.
            wandb_id: Under what the backend knows the run that is resumed, if there is one.
            is_silent: Whether nothing is logged, since another process of the run does it.
            directions: Validation metrics, and which of their values are better, as far as that is known.
            step: Steps done before the run was resumed.

        Raises:
            SettingError: As for `backend_class`.
        """
        self._file = MetricsFile(run_dir / "metrics.jsonl")
        self._is_silent = is_silent
        self._resumed_id = wandb_id
        self._backend: TrackingBackend | None = None
        self._name = config.backend
        self._last_step = step
        # Of rows that were logged together, the last one, until it is shown.
        self._held: Row | None = None
        # By name, what the end of the epoch shows.
        self._waiting: dict[str, Callable[[], None]] = {}
        self.is_less = False
        self.message = f"{config.backend}: " + ("on rank 0" if is_silent else "disabled")
        if config.backend == "none":
            self.message = "no tracking; the numbers are in metrics.jsonl"
        kind = None if is_silent else backend_class(config)
        if kind is not None:
            run = TrackedRun(config, run_dir, name, run_config, directions or {}, wandb_id, step)
            self._start(kind, run)

    @property
    def wandb_id(self) -> str | None:
        """Under what the backend can resume the run; None if it needs nothing for that."""
        return self._resumed_id if self._backend is None else self._backend.run_id

    @property
    def shows_pictures(self) -> bool:
        """Whether pictures are shown; else none need be drawn."""
        return self._backend is not None and type(self._backend).picture is not TrackingBackend.picture

    @property
    def url(self) -> str | None:
        """Where the run can be seen; None if nowhere."""
        return None if self._backend is None else self._backend.url

    def flush_to_disk(self) -> int:
        """Forces `metrics.jsonl` to disk; returns its size in bytes."""
        return self._file.flush_to_disk()

    def cut_back(self, num_bytes: int) -> None:
        """Takes what was logged after a checkpoint out of `metrics.jsonl`: it is going to be logged again."""
        if not self._is_silent:
            self._file.cut_back(num_bytes)

    def log(self, row: Row, shown: Collection[str] | None = None) -> None:
        """Logs one row.

        Args:
            row: The numbers; `step`, the number of steps done, must be in it and never go back.
            shown: Those that are shown as well; all if not given.
        """
        if self._is_silent:
            return
        self._file.append([row])
        self.show(row if shown is None else {key: row[key] for key in ("step", *shown) if key in row})

    def log_steps(self, rows: Sequence[Row]) -> None:
        """Logs rows of steps; of these, a backend may show the last one only."""
        if self._is_silent:
            return
        self._file.append(rows)
        if self._backend is not None and self._backend.shows_every_step:
            for row in rows:
                self.show(row)
        else:
            self._show_held()
            # An epoch's last one is shown with its validation, at once.
            self._held = rows[-1]

    def show(self, row: Row) -> None:
        """Shows one row without logging it."""
        if self._held is not None and self._held["step"] == row["step"]:
            row, self._held = {**self._held, **row}, None
        self._show_held()
        self._last_step = int(row["step"])
        self._do("log", lambda backend: backend.log(row, self._last_step))

    def _show_held(self) -> None:
        if self._held is not None:
            row, self._held = self._held, None
            self.show(row)

    def log_table(self, name: str, columns: Sequence[str], rows: Table, step: int) -> None:
        """Shows a table, at the last row's step if that is later: no step goes back."""
        self._show_held()
        self._do(name, lambda backend: backend.table(name, columns, rows, max(step, self._last_step)))

    def later(self, name: str, show: Callable[[], None]) -> None:
        """Shows something at the end of the epoch: to draw a picture takes longer than a step.

        Args:
            name: Under which name; what waits under it already is not shown.
            show: Shows it.
        """
        self._waiting[name] = show

    def show_waiting(self) -> None:
        """Shows what waits for the end of the epoch."""
        while self._waiting:
            self._waiting.pop(next(iter(self._waiting)))()

    def log_picture(self, name: str, draw: Callable[[], bytes], step: int) -> None:
        """Shows a picture.

        Args:
            name: Under which name.
            draw: Makes the picture, a PNG file's content; called only if it is shown.
            step: At which step, or that of the last row if that is later.
        """
        self._show_held()
        if self.shows_pictures:
            png = draw()
            self._do(name, lambda backend: backend.picture(name, png, max(step, self._last_step)))

    def alert(self, title: str, text: str, step: int) -> None:
        """Calls for attention."""
        self._do("an alert", lambda backend: backend.alert(title, text, step))

    def finish(self, summary: Row, failed: bool, best: BestCheckpoint | None = None) -> None:
        """Ends tracking.

        Args:
            summary: What stands for the whole run.
            failed: Whether the run did not come to its end.
            best: The best checkpoint, if it did.
        """
        self.show_waiting()
        self._show_held()
        self._do("finishing", lambda backend: backend.finish(summary, best, failed))

    def _start(self, kind: type[TrackingBackend], run: TrackedRun) -> None:
        own = checked_options(kind, run.config.options, "tracking.options") if is_own(run.config.backend) else {}
        try:
            backend = kind(run, **own)  # type: ignore[call-arg]
        except Exception as error:  # noqa: BLE001 - nothing that a backend does ends a run
            self.is_less = True
            self.message = f"{self._name}: off, since it failed ({first_line(error)}); the numbers are in metrics.jsonl"
            return
        self.is_less, self.message = backend.is_less, backend.message or f"tracking: {self._name}"
        self._backend = None if backend.is_off else backend

    def _do(self, what: str, act: Callable[[TrackingBackend], None]) -> None:
        if self._backend is None:
            return
        try:
            act(self._backend)
        except Exception as error:  # noqa: BLE001 - nothing that a backend does ends a run
            self._resumed_id, self._backend = self._backend.run_id, None
            logger.warning(f"{self._name}: stopped, since {what} failed ({first_line(error)}); metrics.jsonl continues")
