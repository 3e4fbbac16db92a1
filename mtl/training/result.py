"""What a run came to."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path

from mtl.audit import Report
from mtl.training.evaluate import Scores


@dataclass
class Outcome:
    """What a run came to.

    Attributes:
        run_dir: Where its files lie.
        trivial: The trivial predictor's metrics.
        scores: Metrics at the end of each phase, by the phase's name.
        report: The audit.
        best_score: The best `val/score`; NaN if it never was a number.
        best_step: The step after which it was reached.
        train_s: Seconds of training and validation, without set-up, up to when it last went on.
        started: When that was, by `time.perf_counter`.
        asked_to_end: The signal that asked it to end and came too late for that; empty if none did.
    """

    run_dir: Path
    trivial: Scores
    scores: dict[str, Scores] = field(default_factory=dict)
    report: Report = field(default_factory=Report)
    best_score: float = math.nan
    best_step: int = 0
    train_s: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    asked_to_end: str = ""

    def seconds_so_far(self) -> float:
        """Seconds of training and validation until now."""
        return self.train_s + time.perf_counter() - self.started
