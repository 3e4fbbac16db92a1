"""`mtl bench`: what a freeze pays, measured on this machine.

For each setting and kind of phase three loops train the same model on the same batches, epoch by epoch in turn:

- naive: what every tutorial shows: `requires_grad = False`, and the whole model run as ever;
- mtl: the real loop, with its audit, log and kept features, from the second epoch of the phase on;
- limit: a bare loop on what a patient person extracts by hand: heads on features, or the rest of the trunk on the
  activations at the boundary; where nothing can be extracted, the naive loop itself.
"""

from __future__ import annotations

import copy
import ctypes
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import AdamW

from mtl.assembly import Parts, assemble
from mtl.config import RunConfig
from mtl.console import table
from mtl.data import Batch, training_batches
from mtl.freeze import enforce, is_frozen
from mtl.keeper import Stepping
from mtl.model import MultiTaskModel
from mtl.model.prefix import Prefix
from mtl.model.trunk import Features
from mtl.names import in_bytes
from mtl.tracking import Tracker
from mtl.trainer import Trainer

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
        phases = [{"name": name, "freeze": freeze, "epochs": _EPOCHS} for name, freeze in self.phases.items()]
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


def bench(quick: bool, tell: Callable[[str], None]) -> list[Row]:
    """Measures all settings; `quick` the first two, with fewer rounds and images.

    Args:
        quick: Whether to take less than three minutes.
        tell: Is told what is being measured.
    """
    rows = []
    for setting in SETTINGS[:2] if quick else SETTINGS:
        for phase in setting.phases:
            tell(f"{setting.name}: {phase}")
            with tempfile.TemporaryDirectory() as folder:
                rows.append(_measure(setting, phase, Path(folder), rounds=3 if quick else 7))
    return rows


def to_json(rows: Iterable[Row]) -> dict[str, Any]:
    return {"rows": [asdict(row) for row in rows]}


def in_words(rows: Iterable[Row]) -> str:
    """The table."""
    header = [
        "setting",
        "phase",
        "naive",
        "mtl",
        "limit",
        "naive/mtl",
        "mtl/limit",
        "1st epoch",
        "audit",
        "peak memory",
    ]
    cells = [
        [
            row.setting,
            row.phase,
            *(f"{seconds:.3f} s" for seconds in (row.naive_s, row.mtl_s, row.limit_s)),
            f"{row.gain:.2f}",
            f"{row.over_limit:.2f}",
            f"{row.first_epoch_s:.3f} s",
            f"{row.audit_share:.1%}",
            " / ".join(in_bytes(row.peak_bytes[name]) for name in ("naive", "mtl", "limit")),
        ]
        for row in rows
    ]
    return table(header, cells, numbers_from=2)


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
    parts = assemble(setting.config(folder, phase), quiet=True)
    index = list(setting.phases).index(phase)
    contenders: dict[str, Callable[[], None]] = {}
    peaks, first = {}, {}
    seconds: dict[str, list[float]] = {"naive": [], "mtl": [], "limit": []}
    with _mtl(parts, index, folder) as (mtl, audit_seconds):
        makers: dict[str, Callable[[], Callable[[], None]]] = {
            "naive": lambda: _naive(parts, index),
            "mtl": lambda: mtl,
            "limit": lambda: _limit(parts, index),
        }
        for name, make in makers.items():
            with _peak(parts.device) as peak:
                contenders[name] = make()
                first[name] = _time(contenders[name], parts.device)
            peaks[name] = peak[0]
        audit_seconds.clear()
        for _ in range(rounds):
            for name, epoch in contenders.items():
                seconds[name].append(_time(epoch, parts.device))
    naive, ours, limit = (median(seconds[name]) for name in ("naive", "mtl", "limit"))
    share = sum(audit_seconds) / sum(seconds["mtl"])
    num_images = len(parts.train) // setting.batch_size * setting.batch_size
    return Row(setting.name, phase, num_images, naive, ours, limit, first["mtl"], share, peaks)


def _time(epoch: Callable[[], None], device: torch.device) -> float:
    started = time.perf_counter()
    epoch()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


@contextmanager
def _mtl(parts: Parts, index: int, folder: Path) -> Iterator[tuple[Callable[[], None], list[float]]]:
    """An epoch of the real loop, without the validation and the checkpoint that follow one."""
    phase = parts.phases[index]
    trainer = Trainer(parts, folder, Tracker(parts.config.tracking, folder, "bench", {}), quiet=True)
    spent: list[float] = []
    audit: Any = trainer.audit
    for name in ("after_backward", "after_step", "verify"):
        setattr(audit, name, _timed(getattr(audit, name), spent))
    enforce(parts.root, phase.freeze.plan)
    stepping: Stepping = trainer.keeper.build_stepping(index)
    patterns = list(phase.freeze.patterns)
    with trainer.audit.phase(phase.name, patterns, [stepping.optimizer, phase.balance]) as record:
        parts.model.trunk_is_frozen = is_frozen(phase.freeze.plan, "trunk")
        trainer.gradients.enter(phase.name, phase.tasks, 1)
        is_entered = False

        def epoch() -> None:
            nonlocal is_entered
            if not is_entered:
                trainer.features.enter(index, record, lambda: trainer.audit.holds, 0)
                trainer.audit.look_every(20 if trainer.features.trunk_rests else 1)
                is_entered = True
            if trainer.features.keeps:
                trainer.audit.verify(bytes_only=True)
            trainer.train_epoch(phase, stepping)
            trainer.audit.verify()

        yield epoch, spent
        trainer.features.leave()


def _timed(call: Callable[..., None], spent: list[float]) -> Callable[..., None]:
    def timed(**options: bool) -> None:
        started = time.perf_counter()
        call(**options)
        spent.append(time.perf_counter() - started)

    return timed


def _naive(parts: Parts, index: int) -> Callable[[], None]:
    model = copy.deepcopy(parts.model)
    return _plain_loop(parts, index, model, lambda batch: model(batch.images))


def _limit(parts: Parts, index: int) -> Callable[[], None]:
    phase, model = parts.phases[index], copy.deepcopy(parts.model)
    if not any(name.startswith("trunk.") for name in phase.freeze.plan.names.frozen):
        return _plain_loop(parts, index, model, lambda batch: model(batch.images))
    _freeze_as_tutorials_do(model, phase.freeze.plan.names.frozen)
    _rest(model)
    batches = [parts.train.batch(each).to(parts.device) for each in torch.split(torch.arange(len(parts.train)), 64)]
    prefix = Prefix.record(model.trunk, model.read, model.prepare(batches[0].images))
    by_batch = [prefix.compute(model.prepare(batch.images)) for batch in batches]
    extracted = [torch.cat(field) for field in zip(*by_batch, strict=True)]

    def outputs(batch: Batch) -> dict[str, Tensor]:
        indices = batch.indices.to(parts.device)
        features: Features = prefix.replay([field.index_select(0, indices) for field in extracted])
        return model.decode(features, batch.size)

    return _plain_loop(parts, index, model, outputs)


def _plain_loop(
    parts: Parts, index: int, model: MultiTaskModel, outputs: Callable[[Batch], dict[str, Tensor]]
) -> Callable[[], None]:
    phase = parts.phases[index]
    balance = copy.deepcopy(phase.balance)
    _freeze_as_tutorials_do(model, phase.freeze.plan.names.frozen)
    _rest(model)
    parameters = [p for p in [*model.parameters(), *balance.parameters()] if p.requires_grad]
    optimizer = AdamW(parameters, lr=1e-3, fused=True)
    epochs = 0

    def epoch() -> None:
        nonlocal epochs
        epochs += 1
        for batch in training_batches(parts.train, phase.batch_size, 0, epochs):
            batch = batch.to(parts.device)
            predicted = outputs(batch)
            losses = torch.stack([task.loss(predicted[name], batch.labels[name]) for name, task in parts.tasks.items()])
            balance(losses).backward()
            optimizer.step()
            optimizer.zero_grad()

    return epoch


def _freeze_as_tutorials_do(model: nn.Module, frozen: Iterable[str]) -> None:
    names = set(frozen)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name not in names


def _rest(model: nn.Module) -> None:
    """Puts modules of frozen parameters in eval mode, since the loops shall all compute the same."""
    model.trunk_is_frozen = False  # type: ignore[assignment]
    for module in model.modules():
        module.__dict__.pop("train", None)
    model.train()
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if own and not any(parameter.requires_grad for parameter in own):
            module.eval()


@contextmanager
def _peak(device: torch.device) -> Iterator[list[int]]:
    """How far the memory grows at most inside: of the device, or of the process."""
    found = [0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found[0] = torch.cuda.max_memory_allocated(device) - before
    elif sys.platform == "linux":
        # Freed memory goes back to the system first, and 5 makes the present size the highest so far (proc(5)).
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        yield found
        found[0] = max(0, _status("VmHWM") - before)
    else:
        yield found


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])
