"""The tables that a user reads before and after training."""

from __future__ import annotations

from mtl.assembly import Parts, Phase
from mtl.console import table
from mtl.trainer import Outcome


def phases_table(parts: Parts) -> str:
    """What each phase freezes, trains, at which rate and for how long."""
    sizes = {name: parameter.numel() for name, parameter in parts.root.named_parameters()}

    def row(phase: Phase) -> list[str]:
        frozen = sum(sizes.get(name, 0) for name in phase.plan.names.frozen)
        trained = sum(sizes.get(name, 0) for name in phase.plan.names.trainable)
        config = phase.config
        rates = sorted({group["lr"] for group in phase.groups})
        steps = parts.num_steps(phase)
        epochs = f"{config.epochs} epoch{'s' if config.epochs != 1 else ''} ({steps} steps)"
        length = epochs if config.epochs else f"{steps} steps"
        patterns = ", ".join(phase.plan.patterns) or "-"
        return [config.name, patterns, f"{frozen:,}", f"{trained:,}", ", ".join(f"{lr:g}" for lr in rates), length]

    header = ["phase", "freeze", "frozen parameters", "trained parameters", "peak lr", "length"]
    return table(header, [row(phase) for phase in parts.phases], numbers_from=2)


def results_table(outcome: Outcome) -> str:
    """Every metric of every task: the trivial predictor beside the end of each phase."""
    rows = [
        [task, name, f"{value:.4f}", *[f"{scores[task][name]:.4f}" for scores in outcome.scores.values()]]
        for task, metrics in outcome.trivial.items()
        for name, value in metrics.items()
    ]
    return table(["task", "metric", "trivial", *outcome.scores], rows, numbers_from=2)


def verdict(outcome: Outcome) -> str:
    """The audit's result in one line."""
    report = outcome.report
    steps = sum(phase.num_steps for phase in report.phases)
    looks = sum(phase.num_tripwire_checks + phase.num_fingerprint_checks for phase in report.phases)
    frozen = ", ".join(f"{phase.name}: {len(phase.fingerprints)}" for phase in report.phases)
    if report.ok:
        return f"audit: clean; frozen tensors bit-identical ({frozen}), no gradients; {looks:,} checks in {steps} steps"
    return "\n".join([f"audit: {len(report.violations)} violations", *[f"  {v}" for v in report.violations[:10]]])
