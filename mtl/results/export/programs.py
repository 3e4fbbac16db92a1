"""The common part of `torch` and `onnx`: one program, or one for the trunk and one for each head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.export import ExportedProgram

from mtl.model.heads import Head
from mtl.model.trunk import reductions
from mtl.results.export.errors import ExportError
from mtl.results.export.images import resized
from mtl.results.export.parity import Run, as_input
from mtl.results.export.parts import HeadPart, TrunkPart, Whole, exportable, read_by
from mtl.results.export.subject import ExportedForm, Subject
from mtl.results.export.trace import first_that_holds, trace

# From a program and the name of its file, without a suffix, to what runs the file: from its inputs to its outputs, both
# by name.
Save = Callable[["Program"], Callable[[Mapping[str, Tensor]], dict[str, Tensor]]]


@dataclass(frozen=True)
class Program:
    """A program that becomes a file.

    Attributes:
        file: The name of the file, without a suffix.
        exported: The program.
        inputs: The names of its inputs, in order.
        outputs: The names of its outputs, in order.
    """

    file: str
    exported: ExportedProgram
    inputs: list[str]
    outputs: list[str]


def export_programs(subject: Subject, split: bool, save: Save, opset: int | None = None) -> ExportedForm:
    """Exports a model, as one program or in parts, in files that give what the model gives.

    Args:
        subject: The model.
        split: Whether the trunk and each head get a file of their own.
        save: Writes a program into a file, over one of the same name, and returns what runs it.
        opset: Of ONNX.

    Returns:
        The comparisons with the model, the sizes that the files take, and what each head reads.

    Raises:
        ExportError: A part cannot be exported; names it.
    """
    grid = _grid(subject)
    made: list[Program] = []

    def make(step: int | None) -> Run:
        made.clear()
        return (_parts if split else _whole)(subject, step, grid, save, made)

    # In parts, the size of the image follows from its maps only where they divide it.
    steps = (grid,) if split else (1, grid)
    sizes, checks = first_that_holds(make, subject.reference, subject.images.images, grid, steps)
    inputs = {program.outputs[0]: program.inputs for program in made[1:]}
    tasks = {name: task for task, name in subject.names.items()}
    return ExportedForm(checks, sizes, opset, {tasks[name]: each for name, each in inputs.items()})


def _whole(subject: Subject, step: int | None, grid: int, save: Save, made: list[Program]) -> Run:
    module = Whole(exportable(subject.network, subject.tasks), subject.input, step or 1)
    try:
        exported = trace(module, "the model", _example(subject, step, grid), step)
    except ExportError:
        if step is None:
            # One part after the other, so that the error names the one that fails.
            _parts(subject, None, grid, lambda _: dict, [])
        raise
    names = subject.names
    program = Program("model", exported, ["images"], [names[task] for task in subject.tasks])
    made.append(program)
    run = save(program)

    def outputs(images: Tensor) -> dict[str, Tensor]:
        found = run({"images": as_input(images, subject.input)})
        return {task: found[names[task]] for task in subject.tasks}

    return outputs


def _parts(subject: Subject, step: int | None, grid: int, save: Save, made: list[Program]) -> Run:
    network, names = exportable(subject.network, subject.tasks), subject.names
    trunk, example = TrunkPart(network, subject.input, step or 1), _example(subject, step, grid)
    with torch.no_grad():
        features = trunk(example)
    exported = trace(trunk, f"the trunk {subject.model.config.trunk.name}", example, step)
    program = Program("trunk", exported, ["images"], list(features))
    made.append(program)
    run_trunk, run_heads = save(program), {}
    for task, head in network.heads.items():
        assert isinstance(head, Head)
        read = read_by(head, features)
        size = (example.shape[-2], example.shape[-1])
        part = HeadPart(head, size, _stride(head, read, size) if step else None)
        what = f"the head of {task}, {type(head).__name__},"
        program = Program(f"head_{names[task]}", trace(part, what, read, step), list(read), [names[task]])
        made.append(program)
        run_heads[task] = (save(program), list(read))

    def outputs(images: Tensor) -> dict[str, Tensor]:
        found = run_trunk({"images": as_input(images, subject.input)})
        given = {task: run({name: found[name] for name in read}) for task, (run, read) in run_heads.items()}
        return {task: given[task][names[task]] for task in subject.tasks}

    return outputs


def _stride(head: Head, read: Mapping[str, Tensor], size: tuple[int, int]) -> tuple[int, int] | None:
    """Pixels to an element of the finest map, from which a head knows the size of the images.

    Raises:
        ExportError: It does not read a map that tells.
    """
    if head.output == "vector":
        return None
    rows, columns = read["pyramid_0"].shape[-2:] if "pyramid_0" in read else (size[0] + 1, size[1] + 1)
    if size[0] % rows or size[1] % columns:
        raise ExportError("the size of the images does not follow from the features")
    return size[0] // rows, size[1] // columns


def _example(subject: Subject, step: int | None, grid: int) -> Tensor:
    """Two images; where sizes vary, of one at which no map has a single row or column: torch takes that for fixed."""
    height, width = (side if step is None else max(side, 2 * grid) for side in subject.size)
    return as_input(resized(subject.images.images[:2], (height, width)), subject.input)


def _grid(subject: Subject) -> int:
    """The stride of the trunk's coarsest map; 32 where timm does not say."""
    return max(reductions(subject.network.trunk), default=32)
