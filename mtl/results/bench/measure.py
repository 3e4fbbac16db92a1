"""Epochs of several loops in turn, timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch

from mtl.results.bench.loops import Loop, limit_loop, mtl_loop, naive_loop
from mtl.results.bench.memory import peak_growth
from mtl.results.bench.settings import Setting
from mtl.training.setup import RunSetup, assemble

Time = Literal["train_s", "epoch_s", "train_cpu_s", "epoch_cpu_s"]
# Makes a loop, given where it writes, and what closes it before that goes.
Maker = Callable[[RunSetup, Path, ExitStack], Loop]
BY_HAND: Mapping[str, Maker] = {
    "naive": lambda setup, folder, _: naive_loop(setup, folder),
    "limit": lambda setup, folder, _: limit_loop(setup, folder),
}


@dataclass(frozen=True)
class Lap:
    """An epoch of one loop, the mean over some in a row.

    Attributes:
        train_s: Seconds of the training part.
        epoch_s: Of the whole epoch, with validation and checkpoint; the last checkpoint is on disk then.
        train_cpu_s: Seconds that the process spent on processors in the training part, all threads together.
        epoch_cpu_s: In the whole epoch.
    """

    train_s: float
    epoch_s: float
    train_cpu_s: float
    epoch_cpu_s: float


@dataclass(frozen=True)
class LoopTimes:
    """One loop.

    Attributes:
        first_s: Seconds to make it (for the limit: to extract) and of its first whole epoch; once, not a median.
        peak_bytes: How far that takes the memory of the process, or of the GPU.
        laps: The epochs after it, those of a round together.
    """

    first_s: float
    peak_bytes: int
    laps: list[Lap]

    def median(self, time: Time) -> float:
        return float(median(getattr(lap, time) for lap in self.laps))

    def over(self, other: LoopTimes, time: Time) -> float:
        """How many times as long as another loop this one takes: the median over rounds."""
        ratios = [getattr(a, time) / getattr(b, time) for a, b in zip(self.laps, other.laps, strict=True)]
        return float(median(ratios))


@dataclass(frozen=True)
class BenchRow:
    """One setting and kind of phase.

    Attributes:
        setting: In words.
        phase: `trunk_frozen`, `half_frozen`, `head_frozen` or `nothing_frozen`.
        num_steps: Steps in an epoch.
        num_images: Training images in an epoch.
        num_val: Validation images after it.
        audit_share: The part of mtl's whole epochs that is spent in the audit's calls.
        tracking: How mtl's run was tracked, if not as asked for.
        loops: `naive`, `mtl`, `limit` and the peers.
    """

    setting: str
    phase: str
    num_steps: int
    num_images: int
    num_val: int
    audit_share: float
    tracking: str
    loops: Mapping[str, LoopTimes]

    def over_limit(self, name: str, time: Time) -> float:
        return self.loops[name].over(self.loops["limit"], time)

    def to_json(self) -> dict[str, Any]:
        """`naive_s`, `mtl_s` and `limit_s` are medians of the training part."""
        common = {key: value for key, value in vars(self).items() if key != "loops"}
        loops = {name: self._loop_json(name) for name in self.loops}
        main = {f"{name}_s": loops[name]["train_s"] for name in ("naive", "mtl", "limit")}
        peaks = {name: each.peak_bytes for name, each in self.loops.items()}
        return common | main | {"peak_bytes": peaks, "loops": loops}

    def _loop_json(self, name: str) -> dict[str, Any]:
        own, times = self.loops[name], list(Lap.__annotations__)
        medians = {time: own.median(time) for time in times}  # type: ignore[arg-type]
        ratios = {f"{time.removesuffix('_s')}_over_limit": self.over_limit(name, time) for time in times}  # type: ignore[arg-type]
        return medians | ratios | {"first_s": own.first_s, "rounds": [asdict(lap) for lap in own.laps]}


def measure(
    setting: Setting, phase: str, folder: Path, rounds: int, others: Mapping[str, Maker] = BY_HAND, epochs: int = 1
) -> BenchRow:
    """Times mtl's loop and others, some epochs of each in turn, back and forth.

    Args:
        setting: The trunk with heads.
        phase: The kind of phase.
        folder: Where run directories and checkpoints go.
        rounds: How often each loop has its turn, after a first epoch.
        others: The other loops by name, the limit among them.
        epochs: How many a turn has.
    """
    setup = assemble(setting.config(folder, phase), quiet=True)
    loops: dict[str, Loop] = {}
    first: dict[str, tuple[float, int]] = {}
    laps: dict[str, list[Lap]] = {}
    with ExitStack() as stack:
        mtl = stack.enter_context(mtl_loop(setup))
        # Last, since the others copy the model before it is frozen, audited and trained.
        makers: dict[str, Maker] = {**others, "mtl": lambda *_: mtl.epoch}
        for name, make in makers.items():
            with peak_growth(setup.device) as peak:
                started = time.perf_counter()
                loops[name] = make(setup, folder, stack)
                _lap(loops[name], setup.device, 1, mtl.wait)
                seconds = time.perf_counter() - started
            first[name], laps[name] = (seconds, peak[0]), []
        mtl.audit_s.clear()
        for number in range(rounds):
            for name in list(loops)[:: -1 if number % 2 else 1]:
                laps[name].append(_lap(loops[name], setup.device, epochs, mtl.wait))
    in_order = sorted(loops, key=lambda name: ["naive", "mtl", "limit", *others].index(name))
    times = {name: LoopTimes(*first[name], laps[name]) for name in in_order}
    share = sum(mtl.audit_s) / sum(epochs * lap.epoch_s for lap in laps["mtl"])
    num_steps = setup.phases[0].steps_per_epoch
    return BenchRow(
        *(setting.name, phase, num_steps, num_steps * setting.batch_size, len(setup.val)),
        *(share, mtl.message, times),
    )


def _lap(loop: Loop, device: torch.device, epochs: int, wait: Callable[[], None]) -> Lap:
    marks: list[tuple[float, float]] = []

    def mark() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        marks.append((time.perf_counter(), time.process_time()))

    mark()
    for _ in range(epochs):
        loop(mark)
        if len(marks) == 2 * epochs:
            wait()
        mark()
    # At the start, then by turns after the training part and after the rest of an epoch.
    wall, cpu = zip(*marks, strict=True)
    trained = [sum(b - a for a, b in zip(times[:-1:2], times[1::2], strict=True)) / epochs for times in (wall, cpu)]
    return Lap(trained[0], (wall[-1] - wall[0]) / epochs, trained[1], (cpu[-1] - cpu[0]) / epochs)
