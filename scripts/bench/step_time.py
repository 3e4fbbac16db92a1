"""What the training loop costs beyond the work itself: mtl's loop against one written by hand, interleaved.

    python scripts/bench/step_time.py [CONFIG] [key=value ...] [--rounds N] [--steps N]

Both do the same work on the same model and batches: forward, losses, balancing, backward, AdamW, rate schedule. mtl's
also audits, logs and shows progress. Prints the median seconds a step of each, and the ratio, for each phase.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch

from mtl.config import load_config
from mtl.data import training_batches
from mtl.optim.lr_schedule import LrSchedule
from mtl.phases.phase_length import PhaseLength
from mtl.phases.resolve import Phase
from mtl.phases.scheduler import TaskScheduler
from mtl.training.autotune import autocast_for
from mtl.training.loop import Trainer
from mtl.training.phase import ActivePhase
from mtl.training.setup import RunSetup, assemble
from mtl.training.tracking.tracker import Tracker


def new_schedule(phase: Phase, optimizer: torch.optim.Optimizer, num_steps: int) -> LrSchedule:
    """A schedule of so few steps from the phase's peak rates, which the one before has brought down to 0."""
    for group, peak in zip(optimizer.param_groups, phase.groups, strict=True):
        group["lr"] = peak["lr"]
    return LrSchedule(phase.optim.lr_schedule, optimizer, num_steps, phase.steps_per_epoch)


def by_hand(
    setup: RunSetup, phase: Phase, autocast: torch.autocast, optimizer: torch.optim.Optimizer, num_steps: int
) -> float:
    """Seconds a step of the loop that one would write."""
    schedule = new_schedule(phase, optimizer, num_steps)
    started = time.perf_counter()
    for batch in islice(training_batches(setup.train, phase.batch_size, 0, 0), num_steps):
        with autocast:
            outputs = setup.model(batch.images)
        losses = torch.stack([task.loss(outputs[name], batch.labels[name]) for name, task in setup.tasks.items()])
        phase.balance(losses).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return (time.perf_counter() - started) / num_steps


def by_mtl(trainer: Trainer, active: ActivePhase, num_steps: int) -> float:
    """The real loop without what follows an epoch: validation and checkpoint are work of their own."""
    assert active.optim is not None
    active.optim.lr_schedule = new_schedule(active.phase, active.optim.optimizer, num_steps)
    trainer.state.scheduler = TaskScheduler([PhaseLength(active.phase.name, steps=num_steps)])
    trainer.state.change = None
    started = time.perf_counter()
    trainer.train_epoch(active)
    return (time.perf_counter() - started) / num_steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, nargs="?", default=Path("configs/scenes.yaml"))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        always = [f"runs_dir={folder}", "tracking.mode=disabled", "cache=off"]
        config = load_config(options.config, [*always, *options.overrides])
        setup = assemble(config)
        tracker = Tracker(config.tracking, Path(folder), "bench", {})
        autocast = autocast_for(config.precision, setup.device)
        for index, phase in enumerate(setup.phases):
            trainer = Trainer(setup, Path(folder), tracker, quiet=False)
            trainer.state.phase_index = index
            seconds: dict[str, list[float]] = {"hand": [], "mtl": []}
            with trainer.active(phase) as active:
                assert active.optim is not None
                for round_number in range(options.rounds + 1):
                    hand = by_hand(setup, phase, autocast, active.optim.optimizer, options.steps)
                    mtl = by_mtl(trainer, active, options.steps)
                    if round_number:  # the first round warms up
                        seconds["hand"].append(hand)
                        seconds["mtl"].append(mtl)
            hand, mtl = (statistics.median(values) for values in seconds.values())
            ratio = statistics.median(m / h for h, m in zip(*seconds.values(), strict=True))
            times = f"by hand {hand * 1e3:.1f} ms, mtl {mtl * 1e3:.1f} ms a step, ratio {ratio:.3f}"
            sys.stdout.write(f"{phase.name}: {times}\n")


if __name__ == "__main__":
    main()
