"""Predictions as labels: a table that `data.name: table` reads."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from mtl.results.predict.outputs import UNITS, png_of
from mtl.tasks import Segmentation, Task

# The column that says which weights have labelled a row; tables are read without the columns that no task names.
FINGERPRINT = "predicted_by"


def label_cell(task: Task, label: Tensor, path: str) -> str:
    """A label as a table has it.

    Args:
        task: The task.
        label: As `Task.as_label` gives it, without its first axis.
        path: The file in which a mask, a depth or a normal map lies.
    """
    if task.label_kind in ("mask", "depth", "normals"):
        return path
    if task.label_kind == "class":
        return str(_names(task.class_names, int(label)))
    if task.label_kind == "points":
        return ";".join(",".join(f"{number:.6g}" for number in point) for point in label.tolist())
    numbers = label.flatten().tolist()
    if task.label_kind == "tags" and task.class_names:
        there = [name for name, yes in zip(task.class_names, numbers, strict=True) if yes]
        return ";".join(there) if there else ";"
    return ";".join(f"{number:.9g}" for number in numbers)


def _names(names: Sequence[str], number: int) -> str | int:
    return names[number] if number < len(names) else number


def label_file(task: Task, label: Tensor) -> bytes | None:
    """The file of a label that the task's prediction is no label of: edges and saliency as 0 and 1; None of others."""
    if task.label_kind == "mask" and not isinstance(task, Segmentation) and not label.is_floating_point():
        return png_of(label.numpy().astype(np.uint8))
    return None


def table_of(rows: Sequence[Mapping[str, str]]) -> str:
    """The content of a CSV file; a row may lack columns."""
    stream = io.StringIO()
    columns = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(stream, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def settings_for(table: Path, tasks: Mapping[str, Task], is_outside: bool) -> str:
    """The `data` of a configuration that trains on the table, as YAML in one line.

    Args:
        table: The file.
        tasks: Its tasks by name.
        is_outside: Whether images lie outside of its folder.
    """
    depths = [name for name, task in tasks.items() if task.label_kind == "depth"]
    parts = [f"name: table, train: {table}, split: {{by: hash, val: 0.2}}"]
    parts += ["outside: true"] if is_outside else []
    parts += [f"scale: {{{', '.join(f'{name}: {1 / UNITS}' for name in depths)}}}"] if depths else []
    return f"data: {{{', '.join(parts)}}}"
