"""What it costs to be able to go on: the seconds of each checkpoint, and of taking up the last one of each phase.

The configuration is trained once, in a temporary folder, with all its epochs; then a run is begun from the last
checkpoint of each phase but the last, up to where it would train. "saving" is the median over a phase's epochs of the
time in `Saver.save` over that of the whole epoch with its validation; "going on" is what lies between the start of a
run whose parts are made and its first epoch (reading, digests, moments), less the same for a run that begins, over a
median epoch of the phase it goes on with.

python scripts/bench/checkpoint_cost.py configs/scenes.yaml [key=value ...]
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from mtl.config import ConfigError, load_config
from mtl.training.loop import Trainer
from mtl.training.run import train
from mtl.training.saver import Saver
from mtl.training.setup import assemble


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
                going_on = seconds_to_first_epoch(folder, f"name=again-{phase}", f"resume={source}")
                sys.stdout.write(
                    f"going on with {phase}: {going_on:.2f} s, beginning: {begun:.2f} s;"
                    f" {(going_on - begun) / median(epochs[phase]):.2%} of an epoch\n"
                )
        except ConfigError as error:
            sys.stderr.write(f"error: {error}\n")
            return 2
    return 0


def settings(folder: str, *more: str) -> Any:
    always = [f"runs_dir={folder}", "tracking.mode=disabled", "checkpoint.keep_every_epochs=1"]
    return load_config(Path(sys.argv[1]), [*always, *sys.argv[2:], *more])


def train_whole(folder: str) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds in `Saver.save` and of whole epochs, by phase."""
    saving, epochs = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
    save, run_epoch = Saver.save, Trainer.run_epoch

    def timed(note: defaultdict[str, list[float]], call: Callable[..., Any], place: int) -> Callable[..., Any]:
        def act(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = call(*arguments, **options)
            note[arguments[place].name].append(time.perf_counter() - start)
            return result

        return act

    Saver.save, Trainer.run_epoch = timed(saving, save, 2), timed(epochs, run_epoch, 1)  # type: ignore[method-assign]
    try:
        train(assemble(settings(folder, "name=whole")))
    finally:
        Saver.save, Trainer.run_epoch = save, run_epoch  # type: ignore[method-assign]
    return saving, epochs


def ends_of_phases(folder: Path, epochs: dict[str, list[float]]) -> list[Path]:
    """The last checkpoint of each phase but the last."""
    kept = sorted((folder / "whole/checkpoints").glob("step-*"))
    numbers = [len(seconds) for seconds in epochs.values()]
    return [kept[sum(numbers[: place + 1]) - 1] for place in range(len(numbers) - 1)]


def seconds_to_first_epoch(folder: str, *overrides: str) -> float:
    """From the start of a run, whose parts are made, to its first epoch; the median of three."""
    run_epoch = Trainer.run_epoch

    def stop(*_: Any) -> None:
        raise Enough

    Trainer.run_epoch = stop  # type: ignore[assignment, method-assign]
    found = []
    try:
        for number in range(3):
            parts = assemble(settings(folder, *overrides, f"{overrides[0]}-{number}"), quiet=True)
            start = time.perf_counter()
            try:
                train(parts, quiet=True)
            except Enough:
                found.append(time.perf_counter() - start)
    finally:
        Trainer.run_epoch = run_epoch  # type: ignore[method-assign]
    return median(found)


if __name__ == "__main__":
    sys.exit(main())
