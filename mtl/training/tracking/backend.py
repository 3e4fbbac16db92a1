"""Tracking backends: the interface that wandb, tensorboard and a class of the user's own have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel

from mtl.config import TrackingConfig
from mtl.runtime.best import Direction

Row = Mapping[str, float | int | str]
Table = Iterable[Sequence[float | str | None]]


@dataclass(frozen=True)
class TrackedRun:
    """A run, as a backend is made for it.

    Attributes:
        config: How it is tracked.
        run_dir: Its directory, which exists.
        name: Its name.
        settings: Its resolved configuration, plain data.
        directions: Its validation metrics, and which of their values are better; None where that is not known.
        resumed_id: What `run_id` was before the run was resumed; None if it begins.
        step: Optimizer steps done before; 0 if it begins.
    """

    config: TrackingConfig
    run_dir: Path
    name: str
    settings: Mapping[str, Any]
    directions: Mapping[str, Direction | None] = field(default_factory=dict)
    resumed_id: str | None = None
    step: int = 0


@dataclass(frozen=True)
class BestCheckpoint:
    """The checkpoint with the best `val/score`.

    Attributes:
        folder: Where it lies.
        step: Optimizer steps done when it was written.
        metrics: Its validation metrics by name.
    """

    folder: Path
    step: int
    metrics: Mapping[str, float]


class TrackingBackend(ABC):
    """Shows one run; made on rank 0 only. An error that it raises ends tracking, never the run.

    A class of the user's own is called with the run, and with its options as keyword arguments. Of the five methods it
    has to have `log`; what it leaves out is not shown, and pictures that are not shown are not drawn.

    Attributes:
        Options: The model of the options of a class of the user's own, a subclass of `mtl.config.Strict`; without one,
            they are not checked before they are passed.
        message: Where the run is shown, in one line.
        is_less: Whether that is less than what was asked for.
        is_off: Whether nothing is shown after all; then it is not called again.
        url: Where the run can be seen; None if nowhere.
        run_id: Under what the run is continued if it is resumed, saved in checkpoints; None if that needs nothing.
        shows_every_step: Whether it gets the row of every step, or of those that are logged together only the last.
    """

    Options: ClassVar[type[BaseModel] | None] = None
    message: str = ""
    is_less: bool = False
    is_off: bool = False
    url: str | None = None
    run_id: str | None = None
    shows_every_step: ClassVar[bool] = True

    @abstractmethod
    def log(self, row: Row, step: int) -> None:
        """Shows numbers and words; `step`, the number of steps done, never goes back, but may come again."""

    def table(self, name: str, columns: Sequence[str], rows: Table, step: int) -> None:  # noqa: B027
        """Shows a table, in place of an earlier one of that name."""

    def picture(self, name: str, png: bytes, step: int) -> None:  # noqa: B027
        """Shows a picture, the content of a PNG file."""

    def alert(self, title: str, text: str, step: int) -> None:  # noqa: B027
        """Calls for attention: the audit found a violation, or a loss is not finite."""

    def finish(self, summary: Row, best: BestCheckpoint | None, failed: bool) -> None:  # noqa: B027
        """Ends tracking.

        Args:
            summary: What stands for the whole run.
            best: The best checkpoint, if the run was trained to its end and has one.
            failed: Whether the run did not come to its end.
        """
