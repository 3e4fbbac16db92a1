"""What it costs to be able to resume: the seconds of each checkpoint, and of resuming the last one of each phase.

The configuration is trained once, in a temporary folder, with all its epochs; then a run is begun from the last
checkpoint of each phase but the last, up to where it would train. "saving" is the median over a phase's epochs of the
time that training waits in `CheckpointWriter.write` (the files are written during the next epoch) over that of the
whole epoch with its validation; "resuming" is what lies between the start of a run whose parts are made and its first
epoch (reading, digests, optimizer state), less the same for a run that begins, over a median epoch of the phase it
resumes with.

python scripts/bench/checkpoint_cost.py configs/scenes.yaml [key=value ...]
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

from mtl.config import ConfigError, load_config
from mtl.training.checkpoints import CheckpointWriter
from mtl.training.loop import Trainer
from mtl.training.phase import ActivePhase
from mtl.training.resume import resumed_config
from mtl.training.run import train
from mtl.training.setup import assemble
from mtl.training.state import RunState


class Enough(Exception):  # noqa: N818 - it is no error
    """The first epoch would begin."""


def main() -> int:
    if len(sys.argv) < 2:
        sys.stderr.write(f"{__doc__}\n")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        try:
            saving, epochs = train_whole(folder)
            begun = seconds_to_first_epoch(folder, "name=begun")
            sys.stdout.write(f"{'phase':20}{'epoch, s':>10}{'save, ms':>10}{'saving':>9}\n")
            for phase, seconds in epochs.items():
                ratio = median(save / epoch for save, epoch in zip(saving[phase], seconds, strict=True))
                sys.stdout.write(f"{phase:20}{median(seconds):10.2f}{1e3 * median(saving[phase]):10.1f}{ratio:9.2%}\n")
            for source, phase in zip(ends_of_phases(Path(folder), epochs), list(epochs)[1:], strict=True):
                resuming = seconds_to_first_epoch(folder, f"name=again-{phase}", f"resume={source}")
                sys.stdout.write(
                    f"resuming with {phase}: {resuming:.2f} s, beginning: {begun:.2f} s;"
                    f" {(resuming - begun) / median(epochs[phase]):.2%} of an epoch\n"
                )
        except ConfigError as error:
            sys.stderr.write(f"error: {error}\n")
            return 2
    return 0


def settings(folder: str, *more: str) -> Any:
    always = [f"runs_dir={folder}", "tracking.mode=disabled", "checkpoint.keep_every_epochs=1"]
    return load_config(Path(sys.argv[1]), [*always, *sys.argv[2:], *more])


def train_whole(folder: str) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds in `CheckpointWriter.write` and of whole epochs, by phase."""
    saving, epochs = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
    write, train_epoch, finish_epoch = CheckpointWriter.write, Trainer.train_epoch, Trainer.finish_epoch
    begun: list[float] = []

    def timed_write(writer: CheckpointWriter, state: RunState, active: ActivePhase, *more: Any, **options: Any) -> Path:
        start = time.perf_counter()
        folder = write(writer, state, active, *more, **options)
        saving[active.phase.name].append(time.perf_counter() - start)
        return folder

    def timed_begin(trainer: Trainer, active: ActivePhase) -> None:
        begun[:] = [time.perf_counter()]
        train_epoch(trainer, active)

    def timed_finish(trainer: Trainer, active: ActivePhase) -> None:
        finish_epoch(trainer, active)
        epochs[active.phase.name].append(time.perf_counter() - begun[0])

    CheckpointWriter.write = timed_write  # type: ignore[method-assign]
    Trainer.train_epoch, Trainer.finish_epoch = timed_begin, timed_finish  # type: ignore[method-assign]
    try:
        train(assemble(settings(folder, "name=whole")))
    finally:
        CheckpointWriter.write = write  # type: ignore[method-assign]
        Trainer.train_epoch, Trainer.finish_epoch = train_epoch, finish_epoch  # type: ignore[method-assign]
    return saving, epochs


def ends_of_phases(folder: Path, epochs: dict[str, list[float]]) -> list[Path]:
    """The last checkpoint of each phase but the last."""
    kept = sorted((folder / "whole/checkpoints").glob("step-*"))
    numbers = [len(seconds) for seconds in epochs.values()]
    return [kept[sum(numbers[: place + 1]) - 1] for place in range(len(numbers) - 1)]


def seconds_to_first_epoch(folder: str, *overrides: str) -> float:
    """From the start of a run, whose parts are made, to its first epoch; the median of three."""
    train_epoch = Trainer.train_epoch

    def stop(*_: Any) -> None:
        raise Enough

    Trainer.train_epoch = stop  # type: ignore[assignment, method-assign]
    found = []
    try:
        for number in range(3):
            config, source = resumed_config(settings(folder, *overrides, f"{overrides[0]}-{number}"))
            setup = assemble(config, quiet=True)
            start = time.perf_counter()
            try:
                train(setup, quiet=True, source=source)
            except Enough:
                found.append(time.perf_counter() - start)
    finally:
        Trainer.train_epoch = train_epoch  # type: ignore[method-assign]
    return median(found)


if __name__ == "__main__":
    sys.exit(main())
