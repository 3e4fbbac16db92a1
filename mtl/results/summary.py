"""The lines that a run logs after training: results, the audit's verdict, the best score."""

from __future__ import annotations

import math
from collections.abc import Mapping

from mtl.audit.report import grouped
from mtl.runtime.layout import table, wrap_text
from mtl.runtime.text import shorten
from mtl.training.result import RunResult

_MOST_PHASES = 6
# A narrower terminal is shown the tasks' main metrics only.
_WIDE = 100


def results_table(result: RunResult, main: Mapping[str, str], width: int | None) -> str:
    """The tasks' metrics: the trivial predictor next to the end of each phase, or of the last few.

    Args:
        result: The run's result.
        main: The main metric of each task; others are left out on a narrow terminal.
        width: Of the terminal; None in a file, which has every metric on whole lines.
    """
    shown = list(result.scores)[-_MOST_PHASES:]
    is_narrow = width is not None and width < _WIDE
    rows = [
        [task, name, f"{value:.4f}", *[f"{result.scores[phase][task][name]:.4f}" for phase in shown]]
        for task, metrics in result.trivial.items()
        for name, value in metrics.items()
        if not is_narrow or name == main[task]
    ]
    numbers = range(2, 3 + len(shown))
    notes = []
    if len(rows) < sum(map(len, result.trivial.values())):
        notes += ["(only main metrics; all: metrics.jsonl)"]
    if left_out := list(result.scores)[:-_MOST_PHASES]:
        notes += [wrap_text(f"(left out: {', '.join(left_out)}; see metrics.jsonl)", width, indent=1)]
    return "\n".join([table(["task", "metric", "trivial", *shown], rows, numbers, width, keys=2), *notes])


def verdict(result: RunResult) -> str:
    """The audit's result in one line."""
    report = result.report
    steps = sum(phase.num_steps for phase in report.phases)
    looks = sum(phase.num_tripwire_checks + phase.num_fingerprint_checks for phase in report.phases)
    frozen = shorten([f"{phase.name}: {len(phase.fingerprints)}" for phase in report.phases], _MOST_PHASES)
    if report.ok:
        return f"audit: clean; frozen tensors bit-identical ({frozen}), no gradients; {looks:,} checks in {steps} steps"
    if not report.violations:
        unproven = [f"{phase.name}: {phase.unproven or 'it was not ended'}" for phase in report.phases if not phase.ok]
        return f"audit: not proven: {shorten(unproven, _MOST_PHASES) or 'there was no phase'}"
    lines = grouped(report.violations)[:10]
    return "\n".join([f"audit: {len(report.violations)} violations", *(f"  {line}" for line in lines)])


def closing_line(result: RunResult) -> str:
    """The best score, and how long training took."""
    best = "no best val/score: it was never finite"
    if not math.isnan(result.best_score):
        best = f"best val/score {result.best_score:.3f} at step {result.best_step}"
    return f"{best}; {result.train_s:.0f} s of training"
