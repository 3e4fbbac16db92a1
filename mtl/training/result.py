"""The result of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mtl.audit import Report
from mtl.training.validation import Scores


@dataclass
class RunResult:
    """The result of a run.

    Attributes:
        run_dir: The run directory.
        trivial: The trivial predictor's metrics.
        scores: Metrics at the end of each phase, by the phase's name.
        report: The audit.
        best_score: The best `val/score`; NaN if it never was finite.
        best_step: The step after which it was reached.
        train_s: Seconds of training and validation, without set-up.
        asked_to_end: The signal that asked it to end, and came too late for that; empty if none did.
    """

    run_dir: Path
    trivial: Scores
    scores: dict[str, Scores]
    report: Report
    best_score: float
    best_step: int
    train_s: float
    asked_to_end: str = ""
