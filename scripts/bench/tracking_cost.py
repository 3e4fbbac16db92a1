"""What tracking adds to a training step: the same steps with and without a backend, in turn.

    python scripts/bench/tracking_cost.py                                    a tiny trunk at 32 pixels
    python scripts/bench/tracking_cost.py configs/scenes.yaml                the default run's steps

Each round takes some steps of the run's last phase with no backend, with wandb's offline file, and with tensorboard, in
an order that turns around; rows are fetched and logged as in a run. Printed for each: the median of a step's time, the
median over rounds of its ratio to no backend, and the share of it that is spent in logging calls, by the clock and of
processor time, which other work on the machine blurs less than the ratio. Predictions, drawn after a validation, and
the heat map of the tasks' gradients are timed by themselves, in processor time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from mtl.config import load_config
from mtl.optim.task_gradients import analyse, trunk_groups
from mtl.training.loop import Trainer
from mtl.training.setup import assemble
from mtl.training.tracking.gradient_figure import draw_gradients, png_of
from mtl.training.tracking.tracker import Tracker

SMALL = {
    "name": "small",
    "trunk": {"name": "test_resnet"},
    "data": {"name": "scenes", "image_size": 32, "batch_size": 16, "num_train": 320, "num_val": 32},
    "tasks": {
        "segmentation": {"type": "segmentation", "num_classes": 13},
        "depth": {"type": "depth"},
        "normals": {"type": "normals"},
        "object": {"type": "classification", "num_classes": 10},
    },
    "balance": {"method": "uw"},
    "phases": [{"name": "all", "epochs": 1000}],
}
BACKENDS = {"none": ("none", "auto"), "wandb": ("wandb", "offline"), "tensorboard": ("tensorboard", "auto")}


class Timed(Tracker):
    """Adds up the seconds of logging calls: by the clock, and of processor time in all threads of this process."""

    seconds = processor_s = 0.0

    @contextmanager
    def _clock(self) -> Iterator[None]:
        start, processor = time.perf_counter(), time.process_time()
        yield
        self.seconds += time.perf_counter() - start
        self.processor_s += time.process_time() - processor

    def log(self, *arguments: Any, **options: Any) -> None:
        with self._clock():
            super().log(*arguments, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, nargs="?")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=20, help="steps of a round; the rows of all are logged together")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = options.config
        if file is None:
            file = Path(folder) / "small.yaml"
            file.write_text(yaml.safe_dump(SMALL))
        always = [f"runs_dir={folder}", "cache=off", "audit.gradients_every_steps=0"]
        always += [f"tracking.log_every_steps={options.steps}"]
        setup = assemble(load_config(file, [*always, *options.overrides]), quiet=True)
        measure(setup, Path(folder), options.rounds, options.steps)


def measure(setup: Any, folder: Path, rounds: int, num_steps: int) -> None:
    config = setup.config.tracking
    trackers = {}
    for name, (backend, mode) in BACKENDS.items():
        (folder / name).mkdir()
        chosen = config.model_copy(update={"backend": backend, "mode": mode})
        trackers[name] = Timed(chosen, folder / name, name, {})
    trainer = Trainer(setup, folder, trackers["none"], quiet=True)
    trainer.state.phase_index = len(setup.phases) - 1
    phase = setup.phases[-1]
    times: dict[str, list[float]] = {name: [] for name in trackers}
    shares: dict[str, list[float]] = {name: [] for name in trackers}
    processor_shares: dict[str, list[float]] = {name: [] for name in trackers}
    with trainer.active(phase) as active:
        batches = iter(())
        for number in range(rounds + 1):
            for name in list(trackers)[:: 1 if number % 2 else -1]:
                tracker = trainer.log._tracker = trackers[name]
                active.log = trainer.log.steps_of(phase, 1, None, has_scaler=False)
                tracker.seconds, tracker.processor_s, windows = 0.0, 0.0, []
                while len(windows) < num_steps:
                    batch = next(batches, None)
                    if batch is None:
                        batches = trainer._batches(phase)
                        continue
                    windows.append([batch])
                synchronise(setup.device)
                start, processor = time.perf_counter(), time.process_time()
                for window in windows:
                    trainer.train_step(active, active.optim, window)
                    trainer.state.step += 1
                active.log.flush()
                synchronise(setup.device)
                seconds, processor = time.perf_counter() - start, time.process_time() - processor
                if number:  # the first round warms up
                    times[name].append(seconds / num_steps)
                    shares[name].append(tracker.seconds / seconds)
                    processor_shares[name].append(tracker.processor_s / processor)
        for name in trackers:
            ratio = statistics.median(one / none for one, none in zip(times[name], times["none"], strict=True))
            sys.stdout.write(
                f"{phase.name}: {name:12} {statistics.median(times[name]) * 1e3:8.2f} ms a step, {ratio:.4f} of no"
                f" backend, {statistics.median(shares[name]):.2%} of it in logging, of processor time"
                f" {statistics.median(processor_shares[name]):.2%}\n"
            )
        pictures(setup, trainer, trackers["wandb"])
    for tracker in trackers.values():
        tracker.finish({}, failed=False)


def pictures(setup: Any, trainer: Trainer, tracker: Tracker) -> None:
    """Times a panel of predictions, and a heat map without the analysis that it shows."""
    predictions = trainer.log.dashboard.predictions
    predictions._tracker = tracker
    batch = setup.train.batch(torch.arange(8)).to(setup.device)
    losses = [task.loss(setup.model(batch.images)[name], batch.labels[name]) for name, task in setup.tasks.items()]
    analysis = analyse(dict(zip(setup.tasks, losses, strict=True)), trunk_groups(setup.model.trunk))
    work = {"a panel of predictions": lambda: predictions.after_validation(1, trainer.state.step)}
    if analysis is not None:  # some of the trunk trains
        work["a heat map"] = lambda: png_of(draw_gradients(analysis))
    for name, draw in work.items():
        found = []
        for _ in range(6):
            start = time.process_time()
            draw()
            found.append(time.process_time() - start)
        sys.stdout.write(f"{name}: {statistics.median(found[1:]) * 1e3:.0f} ms, the first {found[0] * 1e3:.0f} ms\n")


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
