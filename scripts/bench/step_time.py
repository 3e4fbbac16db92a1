"""What the training loop costs beyond the work itself: mtl's loop against one written by hand, interleaved.

    python scripts/bench/step_time.py [CONFIG] [key=value ...] [--rounds N] [--steps N]
    python scripts/bench/step_time.py [CONFIG] [key=value ...] --against CHECKOUT     # mtl's loops of two checkouts

Both do the same work on the same model and batches: forward, losses, balancing, backward, AdamW, rate schedule. mtl's
also audits, logs and shows progress. Prints the median seconds a step of each, and the ratio, for each phase. Two
checkouts are processes that step in turn, two of this one and one of the other: how far the two are apart is noise.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch

from mtl.config import RunConfig, load_config
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

ROOT = Path(__file__).resolve().parents[2]


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


def serve(config: RunConfig, folder: Path) -> None:
    """Steps as often as a line of standard input says and answers with the seconds a step; `next` is the next phase."""
    parts = assemble(config)
    tracker = Tracker(config.tracking, folder, "bench", {})
    for index, phase in enumerate(parts.phases):
        trainer = Trainer(parts, folder, tracker, quiet=True)
        trainer.state.phase_index = index
        with trainer.active(phase) as active:
            for line in iter(sys.stdin.readline, "next\n"):
                sys.stderr.write(f"step_time {by_mtl(trainer, active, int(line))}\n")
                sys.stderr.flush()


class Server:
    """A process that serves from one checkout."""

    def __init__(self, checkout: Path, arguments: list[str]) -> None:
        command = [sys.executable, str(checkout / "scripts/bench/step_time.py"), *arguments, "--serve"]
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def write(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def seconds(self, num_steps: int) -> float:
        assert self._process.stderr is not None
        self.write(str(num_steps))
        for line in self._process.stderr:
            if line.startswith("step_time "):
                return float(line.split()[1])
        raise SystemExit(f"a process ended: {self._process.args}")

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def compare(other: Path, options: argparse.Namespace, config: RunConfig) -> None:
    checkouts = {"this": ROOT, "other": other.resolve(), "this again": ROOT}
    arguments = [str(options.config.resolve()), *options.overrides]
    servers = {name: Server(checkout, arguments) for name, checkout in checkouts.items()}
    for written in config.written_phases:
        rows: list[dict[str, float]] = []
        for number in range(options.rounds + 1):
            order = list(servers)[:: 1 if number % 2 else -1]
            rows.append({name: servers[name].seconds(options.steps) for name in order})
        for name in servers:
            times, ratios = ([row[name] for row in rows[1:]], [row[name] / row["other"] for row in rows[1:]])
            median, ratio = statistics.median(times), statistics.median(ratios)
            sys.stdout.write(f"{written.name}: {name:10} {median * 1e3:8.1f} ms a step, {ratio:.3f} of the other\n")
        for server in servers.values():
            server.write("next")
    for server in servers.values():
        server.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, nargs="?", default=Path("configs/scenes.yaml"))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--against", type=Path, metavar="CHECKOUT")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        always = [f"runs_dir={folder}", "tracking.mode=disabled", "cache=off"]
        config = load_config(options.config, [*always, *options.overrides])
        if options.against is not None:
            compare(options.against, options, config)
            return
        if options.serve:
            serve(config, Path(folder))
            return
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
