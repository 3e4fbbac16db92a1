"""`mtl bench`: what a freeze pays, measured on this machine.

For each setting and kind of phase three loops train the same model on the same batches, epoch by epoch in turn:

- naive: what every tutorial shows: `requires_grad = False`, and the whole model run as ever;
- mtl: the real loop, with its audit, log and kept features, from the second epoch of the phase on;
- limit: a bare loop on what a patient person extracts by hand: heads on features, or the rest of the trunk on the
  activations at the boundary; where nothing can be extracted, the naive loop itself.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure

from mtl.config import RunConfig
from mtl.results.bench.loops import limit_loop, mtl_loop, naive_loop
from mtl.results.bench.memory import peak_growth
from mtl.runtime.layout import table
from mtl.runtime.text import in_bytes
from mtl.training.setup import assemble

# Long enough that the phase decides to keep what it can.
_EPOCHS = 20
_DENSE = {
    "segmentation": {"type": "segmentation", "num_classes": 13},
    "depth": {"type": "depth"},
    "normals": {"type": "normals"},
    "object": {"type": "classification", "num_classes": 10},
}
_LINEAR = {side: {"type": "classification", "num_classes": 10} for side in ("left", "right")}


@dataclass(frozen=True)
class Setting:
    """A trunk with heads, at one size of images and batches.

    Attributes:
        num_images: Images in an epoch; four times as many where only the heads train, since such an epoch is short.
    """

    trunk: str
    image_size: int
    batch_size: int
    num_images: int
    dense: bool
    memory_format: str = "contiguous"

    @property
    def name(self) -> str:
        heads = "dense heads" if self.dense else "linear heads"
        return f"{self.trunk}, {self.image_size} px, batch {self.batch_size}, {heads}"

    @property
    def phases(self) -> dict[str, list[str]]:
        """Patterns of what each kind of phase freezes."""
        head = "heads.depth" if self.dense else "heads.left"
        return {
            "trunk_frozen": ["trunk"],
            "half_frozen": ["trunk@first:50%"],
            "head_frozen": [head],
            "nothing_frozen": [],
        }

    def config(self, folder: Path, phase: str) -> RunConfig:
        phases = [{"name": phase, "freeze": self.phases[phase], "epochs": _EPOCHS}]
        data = {"name": "scenes" if self.dense else "multifashion", "image_size": self.image_size}
        data |= {
            "batch_size": self.batch_size,
            "num_train": (4 if phase == "trunk_frozen" else 1) * self.num_images,
            "num_val": self.batch_size,
        }
        content: dict[str, Any] = {
            "name": "bench",
            "runs_dir": str(folder),
            "tracking": {"mode": "disabled"},
            "data": data,
        }
        content |= {"trunk": {"name": self.trunk}, "memory_format": self.memory_format, "phases": phases}
        return RunConfig.model_validate(content | {"tasks": _DENSE if self.dense else _LINEAR})


SETTINGS = [
    Setting("resnet18", 64, 64, 512, dense=False),
    Setting("tf_efficientnet_lite0", 64, 32, 512, dense=True, memory_format="channels_last"),
    Setting("vit_tiny_patch16_224", 224, 16, 64, dense=False),
]


@dataclass(frozen=True)
class Row:
    """One setting and kind of phase.

    Attributes:
        setting: In words.
        phase: `trunk_frozen`, `half_frozen`, `head_frozen` or `nothing_frozen`.
        num_images: Images in an epoch.
        naive_s: Median seconds of an epoch of the naive loop.
        mtl_s: Of mtl's, from the second on.
        limit_s: Of the limit.
        first_epoch_s: Of mtl's first epoch, in which activations are computed; once, not a median.
        audit_share: The part of mtl's epoch that is spent in the audit's calls.
        peak_bytes: How far each loop's first epoch takes the memory of the process, or of the GPU, with its copy of the
            model and all that it keeps.
    """

    setting: str
    phase: str
    num_images: int
    naive_s: float
    mtl_s: float
    limit_s: float
    first_epoch_s: float
    audit_share: float
    peak_bytes: dict[str, int]

    @property
    def gain(self) -> float:
        """How many times as fast as the naive loop mtl is."""
        return self.naive_s / self.mtl_s

    @property
    def over_limit(self) -> float:
        """How many times as long as the limit mtl takes."""
        return self.mtl_s / self.limit_s


def bench(quick: bool, show: Callable[[str], None]) -> list[Row]:
    """Measures all settings; `quick` the first two, with fewer rounds and images.

    Args:
        quick: Whether to take less than three minutes.
        show: Receives a line for each measurement before it begins.
    """
    rows = []
    settings = [replace(each, num_images=each.num_images // 2) for each in SETTINGS[:2]] if quick else SETTINGS
    for setting in settings:
        for phase in setting.phases:
            show(f"{setting.name}: {phase}")
            with tempfile.TemporaryDirectory() as folder:
                rows.append(_measure(setting, phase, Path(folder), rounds=3 if quick else 7))
    return rows


def to_json(rows: Iterable[Row]) -> dict[str, Any]:
    return {"rows": [asdict(row) for row in rows]}


_MEASURES: dict[str, Callable[[Row], str]] = {
    "naive": lambda row: f"{row.naive_s:.3f} s",
    "mtl": lambda row: f"{row.mtl_s:.3f} s",
    "limit": lambda row: f"{row.limit_s:.3f} s",
    "naive/mtl": lambda row: f"{row.gain:.2f}",
    "mtl/limit": lambda row: f"{row.over_limit:.2f}",
    "1st epoch": lambda row: f"{row.first_epoch_s:.3f} s",
    "audit": lambda row: f"{row.audit_share:.1%}",
}
_LOOPS = ("naive", "mtl", "limit")


def in_words(rows: Sequence[Row], width: int | None = None) -> str:
    """One table; if that is wider than the terminal, one for each setting, with the kinds of phases as columns."""
    header = ["setting", "phase", *_MEASURES, "peak memory"]
    cells = [
        [
            *(row.setting, row.phase, *(measure(row) for measure in _MEASURES.values())),
            " / ".join(in_bytes(row.peak_bytes[name]) for name in _LOOPS),
        ]
        for row in rows
    ]
    text = table(header, cells, numbers=range(2, len(header)))
    if width is None or max(map(len, text.splitlines())) <= width:
        return text
    settings = dict.fromkeys(row.setting for row in rows)
    return "\n\n".join(_setting_table(name, [row for row in rows if row.setting == name], width) for name in settings)


def _setting_table(setting: str, rows: Sequence[Row], width: int) -> str:
    cells = [[name, *map(measure, rows)] for name, measure in _MEASURES.items()]
    cells += [[f"memory, {name}", *(in_bytes(row.peak_bytes[name]) for row in rows)] for name in _LOOPS]
    numbers = range(1, 1 + len(rows))
    return f"{setting}\n{table(['', *(row.phase for row in rows)], cells, numbers, width)}"


def draw(rows: list[Row]) -> Figure:
    """Seconds of an epoch as bars."""
    settings = list(dict.fromkeys(row.setting for row in rows))
    figure = Figure(figsize=(5 * len(settings), 4), layout="constrained")
    for axes, setting in zip(figure.subplots(1, len(settings), squeeze=False)[0], settings, strict=True):
        own = [row for row in rows if row.setting == setting]
        for offset, key, label in ((-0.27, "naive_s", "naive"), (0, "mtl_s", "mtl"), (0.27, "limit_s", "limit")):
            axes.bar([n + offset for n in range(len(own))], [getattr(row, key) for row in own], 0.25, label=label)
        axes.set_xticks(range(len(own)), [row.phase.replace("_", " ") for row in own], fontsize=8)
        axes.set_title(setting, fontsize=9)
        axes.set_ylabel("seconds per epoch")
        axes.legend(fontsize=8)
    return figure


def _measure(setting: Setting, phase: str, folder: Path, rounds: int) -> Row:
    setup = assemble(setting.config(folder, phase), quiet=True)
    contenders: dict[str, Callable[[], None]] = {}
    peaks, first = {}, {}
    seconds: dict[str, list[float]] = {"naive": [], "mtl": [], "limit": []}
    with mtl_loop(setup, folder) as (mtl, audit_seconds):
        makers: dict[str, Callable[[], Callable[[], None]]] = {
            "naive": lambda: naive_loop(setup),
            "mtl": lambda: mtl,
            "limit": lambda: limit_loop(setup),
        }
        for name, make in makers.items():
            with peak_growth(setup.device) as peak:
                contenders[name] = make()
                first[name] = _time(contenders[name], setup.device)
            peaks[name] = peak[0]
        audit_seconds.clear()
        for _ in range(rounds):
            for name, epoch in contenders.items():
                seconds[name].append(_time(epoch, setup.device))
    naive, ours, limit = (median(seconds[name]) for name in ("naive", "mtl", "limit"))
    share = sum(audit_seconds) / sum(seconds["mtl"])
    num_images = len(setup.train) // setting.batch_size * setting.batch_size
    return Row(setting.name, phase, num_images, naive, ours, limit, first["mtl"], share, peaks)


def _time(epoch: Callable[[], None], device: torch.device) -> float:
    started = time.perf_counter()
    epoch()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
