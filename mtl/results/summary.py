"""What a user reads after training."""

from __future__ import annotations

import math

from mtl.audit.report import grouped
from mtl.runtime.console import table
from mtl.runtime.text import shorten
from mtl.training.result import RunResult

# As many columns as a terminal has room for.
_MOST_PHASES = 6


def results_table(outcome: RunResult) -> str:
    """Every metric of every task: the trivial predictor beside the end of each phase, or of the last few."""
    shown = list(outcome.scores)[-_MOST_PHASES:]
    rows = [
        [task, name, f"{value:.4f}", *[f"{outcome.scores[phase][task][name]:.4f}" for phase in shown]]
        for task, metrics in outcome.trivial.items()
        for name, value in metrics.items()
    ]
    text = table(["task", "metric", "trivial", *shown], rows, numbers_from=2)
    left_out = list(outcome.scores)[:-_MOST_PHASES]
    return text + (f"\n(left out: {', '.join(left_out)}; see metrics.jsonl)" if left_out else "")


def verdict(outcome: RunResult) -> str:
    """The audit's result in one line."""
    report = outcome.report
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


def closing_line(outcome: RunResult) -> str:
    """The best score, and how long training took."""
    best = "no best val/score, since it never was a number"
    if not math.isnan(outcome.best_score):
        best = f"best val/score {outcome.best_score:.3f} at step {outcome.best_step}"
    return f"{best}; {outcome.train_s:.0f} s of training"
