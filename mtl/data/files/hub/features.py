"""Columns by their features: which hold images, which labels, and how the cells of labels are parsed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from mtl.data.files.label_files import FILE_KINDS
from mtl.data.files.table.cells import CellError, Language, class_number, entries
from mtl.data.files.table.coded import Coded
from mtl.data.files.table.values import cell_of
from mtl.runtime.text import count, with_article
from mtl.tasks.base import LabelKind

_BINARY = ("binary", "large_binary")


@dataclass(frozen=True)
class GivenClasses(Language):
    """Numbers of classes whose names the data set gives; -1 is no label."""

    classes: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return ()

    def parse(self, cell: str) -> float:
        number = _number_of(cell, self.classes)
        return float(number) if number >= 0 else math.nan


@dataclass(frozen=True)
class GivenTags(Language):
    """The numbers of the tags that an image has; the data set gives their names."""

    classes: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.classes),)

    def parse(self, cell: str) -> list[float]:
        has = [0.0] * len(self.classes)
        for entry in filter(None, entries(cell)):
            if (number := _number_of(entry, self.classes)) < 0:
                raise CellError(f"expected the number of a tag, got {entry}")
            has[number] = 1.0
        return has


def _number_of(cell: str, classes: Sequence[str]) -> int:
    number = class_number(cell)
    if number >= len(classes):
        raise CellError(
            f"expected a number below {len(classes)}, as there are {count(len(classes), 'name')}, got {cell}"
        )
    return number


def holds_files(datasets: ModuleType, feature: Any) -> bool:
    """Whether a column has images, arrays, or the bytes of files."""
    kinds = (datasets.Image, datasets.Array2D, datasets.Array3D)
    return isinstance(feature, kinds) or (isinstance(feature, datasets.Value) and feature.dtype in _BINARY)


def fault_of(datasets: ModuleType, feature: Any, kind: LabelKind | None) -> str:
    """The expected kind of a column; empty if it fits.

    Args:
        datasets: The library.
        feature: The column's feature.
        kind: What the label is; None for the images.
    """
    if kind is None or kind in FILE_KINDS:
        what = f"the task learns {with_article(kind) if kind != 'normals' else kind}; " if kind else ""
        expected = f"{what}expected Image, Array2D, Array3D or binary"
        return "" if holds_files(datasets, feature) else f"{expected}, got {_name(feature)}"
    is_list = isinstance(feature, (datasets.List, datasets.LargeList))
    plain = (datasets.Value, datasets.ClassLabel, datasets.List, datasets.LargeList, datasets.Array2D)
    if not isinstance(feature, plain) or (kind == "class" and is_list):
        expected = "ClassLabel, text or a number" if kind == "class" else "text, a number or a list of them"
        return f"the task learns {kind}; expected {expected}, got {_name(feature)}"
    if kind == "tags" and isinstance(feature, datasets.ClassLabel):
        return "the task learns tags; expected a list of ClassLabel, got one ClassLabel"
    return ""


def _name(feature: Any) -> str:
    return f"Value({feature.dtype!r})" if type(feature).__name__ == "Value" else type(feature).__name__


def given_language(datasets: ModuleType, feature: Any, kind: LabelKind) -> Language | None:
    """The language of a column whose classes have names; None if its cells tell."""
    if kind == "class" and isinstance(feature, datasets.ClassLabel):
        return GivenClasses(tuple(feature.names))
    inner = getattr(feature, "feature", None)
    if kind == "tags" and isinstance(inner, datasets.ClassLabel):
        return GivenTags(tuple(inner.names))
    return None


def coded(column: Any, kind: LabelKind) -> Coded:
    """The cells of an Arrow column; an empty list of tags is none of them. Raises `TypeError` for other values."""
    empty = ";" if kind == "tags" else ""
    return Coded.of([cell_of(value, empty) for value in column.to_pylist()])
