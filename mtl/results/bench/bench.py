"""`mtl bench`: what a freeze pays, and what the loop costs, measured on this machine.

For each setting and kind of phase, loops train the same model on the same batches, epoch by epoch in turn:

- naive: what every tutorial shows: `requires_grad = False`, and the whole model run as ever;
- mtl: the real loop in a run directory of its own, as `mtl train` runs it by default, tracked by wandb offline;
- limit: what a patient person writes by hand for this one phase: a bare loop on features that were extracted before,
  or the rest of the trunk on the activations at the boundary, or, where nothing of the trunk is frozen, the naive loop;
- with peers, LibMTL's loop with equal weighting, and Lightning with FinetuningScheduler.

The training part is the epoch's steps. The whole epoch is what comes with them: validation with the tasks' metrics,
and a checkpoint. By hand that is the bare forward of the validation images (in one batch where only heads run) and
`torch.save`, by the limit of the trainable parameters and their optimizer state, by the naive loop of everything. mtl's
has audit, tracking, predictions that are drawn, and a checkpoint that is forced to disk. Files go to the folder for
temporary files: where that is in memory, forcing them to disk costs nothing (`TMPDIR` names another).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mtl.results.bench.measure import BY_HAND, BenchRow, measure
from mtl.results.bench.peers import peers_here
from mtl.results.bench.settings import SETTINGS
from mtl.runtime.machine import machine

_VERSIONS = ("torch", "timm", "wandb", "lightning", "finetuning-scheduler")


@dataclass(frozen=True)
class Bench:
    """The measurements, and the machine they were taken on.

    Attributes:
        machine: Processor, cores, threads of torch, the GPU if there is one, versions, and the folder of the runs.
        rows: One for each setting and kind of phase.
        missing: Why peers were not measured.
    """

    machine: Mapping[str, Any]
    rows: Sequence[BenchRow]
    missing: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        rows = [row.to_json() for row in self.rows]
        return {"machine": dict(self.machine), "rows": rows, "missing": list(self.missing)}


def bench(quick: bool, show: Callable[[str], None], peers: bool = False) -> Bench:
    """Measures all settings; `quick` the first two, with fewer rounds and steps.

    Args:
        quick: Whether to take some four minutes on two cores (without peers).
        show: Receives a line for each measurement before it begins.
        peers: Whether to run other code bases as well, as far as they are installed.
    """
    there, missing = peers_here() if peers else ({}, [])
    for line in missing:
        show(line)
    settings = [replace(each, num_steps=-(-each.num_steps // 5)) for each in SETTINGS[:2]] if quick else SETTINGS
    rows = []
    for setting in settings:
        for phase in setting.phases:
            show(f"{setting.name}: {phase}")
            # Steps on kept features are short, and much else happens in so short a time.
            rounds, epochs = (4 if quick else 10, 4) if phase == "trunk_frozen" else (3 if quick else 5, 2)
            with tempfile.TemporaryDirectory() as folder:
                rows.append(measure(setting, phase, Path(folder), rounds, {**BY_HAND, **there}, epochs))
    return Bench(measured_on(), rows, missing)


def measured_on() -> dict[str, Any]:
    """The machine, versions and folder that the times depend on."""
    versions = {}
    for name in _VERSIONS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        **machine(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions,
        "folder": tempfile.gettempdir(),
    }
