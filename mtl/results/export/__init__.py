"""A trained model into files for other programs: the trunk for timm, weights, a program of torch.export, ONNX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mtl.results.export.card import card
from mtl.results.export.errors import ExportError
from mtl.results.export.folder import CARD, RECORD, all_or_nothing
from mtl.results.export.images import parity_images
from mtl.results.export.names import output_names
from mtl.results.export.onnx_form import export_onnx
from mtl.results.export.parity import DEFINITION, enforce_parity
from mtl.results.export.parts import Input
from mtl.results.export.subject import ExportedForm, Format, Subject
from mtl.results.export.torch_form import export_torch
from mtl.results.export.weights import export_safetensors, export_timm
from mtl.results.trained import TrainedModel
from mtl.runtime.files import write_json, write_text
from mtl.runtime.provenance import provenance

__all__ = ["ExportError", "Exported", "export"]


@dataclass(frozen=True)
class Exported:
    """An export: its folder and files.

    Attributes:
        folder: Where.
        files: The names of the files, the card and the record last.
        subject: What was exported.
        written: How the files compare with the model.
    """

    folder: Path
    files: list[str]
    subject: Subject
    written: ExportedForm


def export(
    model: TrainedModel,
    out: Path,
    form: Format,
    tasks: Sequence[str] | None = None,
    split: bool = False,
    input: Input = "uint8",  # noqa: A002 - as the option is called
    command: str = "mtl export",
) -> Exported:
    """Exports a trained model into a folder, with a model card; nothing is left of an export that fails.

    Args:
        model: On the CPU.
        out: The folder; of one that is there, only the files of an earlier export are replaced.
        form: `timm` (the trunk's weights), `safetensors` (all weights), `torch` or `onnx` (programs).
        tasks: The tasks whose heads are exported; all if not given.
        split: Whether the trunk and each head get a program of their own.
        input: The form of a program's input.
        command: What the card says it was made by.

    Raises:
        SettingError: There is no such task, or a file in the way is of no export.
        ExportError: The model cannot be exported, or a file does not compute what the model does.
        RunFileError: A file of the run is damaged.
        OSError: The folder cannot be written.
    """
    chosen = model.names_of(tasks)
    # Outputs of a graph are called by names of a kind; those of Python are keys of a dict.
    names = output_names(chosen) if form == "onnx" else {name: name for name in chosen}
    subject = Subject(model, names, input, parity_images(model))
    with all_or_nothing(out) as folder:
        written = _write(subject, form, split, folder)
        enforce_parity(written.checks, written.limit)
        files = sorted(each.name for each in folder.iterdir())
        write_text(folder / CARD, card(subject, written, form, command))
        files += [CARD, RECORD]
        write_json(folder / RECORD, _record(subject, written, form, files, command))
    return Exported(out, files, subject, written)


def _write(subject: Subject, form: Format, split: bool, folder: Path) -> ExportedForm:
    if form == "timm":
        return export_timm(subject, folder)
    if form == "safetensors":
        return export_safetensors(subject, folder)
    return (export_torch if form == "torch" else export_onnx)(subject, folder, split)


def _record(subject: Subject, written: ExportedForm, form: Format, files: list[str], command: str) -> dict[str, object]:
    """The content of `export.json`."""
    sizes = written.sizes
    return {
        "files": files,
        "format": form,
        **subject.about(),
        "input": None if sizes is None else subject.input,
        "image_size": list(subject.size),
        "size_step": None if sizes is None else sizes.step,
        "opset": written.opset,
        "head_inputs": written.inputs,
        "call": written.call or None,
        "parity": {
            "definition": DEFINITION,
            "limit": written.limit,
            "images": subject.images.origin,
            "checks": [
                {"images": check.num_images, "size": list(check.size), "differences": check.differences}
                for check in written.checks
            ],
        },
        "command": command,
        "versions": provenance()["versions"],
    }
