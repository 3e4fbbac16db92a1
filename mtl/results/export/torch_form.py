"""`torch`: programs of `torch.export`, which run without mtl and timm."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from mtl.results.export.programs import Program, export_programs
from mtl.results.export.subject import ExportedForm, Subject
from mtl.results.export.trace import quiet
from mtl.runtime.files import sync

SUFFIX, ABOUT = ".pt2", "mtl.json"


def export_torch(subject: Subject, folder: Path, split: bool) -> ExportedForm:
    """Writes `model.pt2`, or `trunk.pt2` and a `head_<task>.pt2` each, and runs the files.

    Raises:
        ExportError: A part cannot be exported; names it.
    """
    about = json.dumps(subject.about())

    def save(program: Program) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
        file = folder / f"{program.file}{SUFFIX}"
        with quiet():
            torch.export.save(program.exported, file, extra_files={ABOUT: about})
            module = torch.export.load(file).module()
        sync(file)
        is_head, only = program.inputs != ["images"], program.outputs[0]

        def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            with torch.no_grad():
                found = module(dict(inputs) if is_head else inputs["images"])
            return found if isinstance(found, dict) else {only: found}

        return run

    return export_programs(subject, split, save)
