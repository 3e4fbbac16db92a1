"""`onnx`: graphs for ONNX Runtime and other engines, checked and run once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtl.results.export.errors import ExportError
from mtl.results.export.programs import Program, export_programs
from mtl.results.export.subject import ExportedForm, Subject
from mtl.results.export.trace import quiet, reason_of
from mtl.runtime.files import sync

SUFFIX, OPSET = ".onnx", 18


def export_onnx(subject: Subject, folder: Path, split: bool) -> ExportedForm:
    """Writes `model.onnx`, or `trunk.onnx` and a `head_<task>.onnx` each, checks the files and runs them.

    Raises:
        ExportError: A part cannot be exported; names it.
    """

    def save(program: Program) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
        return _save(program, folder / f"{program.file}{SUFFIX}", subject)

    return export_programs(subject, split, save, OPSET)


def _save(program: Program, file: Path, subject: Subject) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    import onnx
    import onnxruntime

    try:
        with quiet(), torch.no_grad():
            made: Any = torch.onnx.export(
                program.exported,
                dynamo=True,
                opset_version=OPSET,
                input_names=program.inputs,
                output_names=program.outputs,
                verbose=False,
            )
    except Exception as error:
        raise ExportError(f"{program.file} cannot be exported: torch.onnx: {reason_of(error)}") from error
    _name_axes(made.model)
    made.model.metadata_props.update(subject.metadata())
    made.save(file)
    onnx.checker.check_model(file, full_check=True)
    sync(file)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = session.run(program.outputs, {name: inputs[name].contiguous().numpy() for name in program.inputs})
        return {name: torch.from_numpy(each) for name, each in zip(program.outputs, found, strict=True)}

    return run


def _name_axes(model: Any) -> None:
    """Names the first axis `batch`, and rows and columns of images `height` and `width`, where they vary."""
    for value in [*model.graph.inputs, *model.graph.outputs]:
        names = {0: "batch"}
        if value.name == "images" or (len(value.shape) == 4 and value in model.graph.outputs):
            names |= {2: "height", 3: "width"}
        for axis, name in names.items():
            if not isinstance(value.shape[axis], int):
                value.shape[axis] = name
