"""Opens a data set of Hugging Face's `datasets`: columns of labels are read and checked, and no image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mtl.config import SettingError
from mtl.config.file_data import SplitName
from mtl.config.hub_data import HuggingFaceData
from mtl.data.files.fileset import IMAGE
from mtl.data.files.hub.features import coded, fault_of, given_language
from mtl.data.files.hub.hub import HubSet
from mtl.data.files.hub.library import library, load_splits
from mtl.data.files.hub.parts import HubRows, parts_of
from mtl.data.files.label_files import FILE_KINDS, check_scale
from mtl.data.files.mistakes import Mistakes
from mtl.data.files.table.cells import Language
from mtl.data.files.table.coded import Coded, check_cells, learn_languages
from mtl.data.files.table.division import divide
from mtl.tasks.base import LabelKind

_Division = dict[str, tuple[HubRows, NDArray[np.int64]]]


def open_hub(
    settings: HuggingFaceData, kinds: Mapping[str, LabelKind], splits: Sequence[SplitName]
) -> dict[str, HubSet]:
    """Opens splits of a data set; columns of labels are read and checked, and no image.

    Args:
        settings: Where it is.
        kinds: What each label is, by column; other columns are not read.
        splits: Which splits.

    Raises:
        DataError: Something is wrong with the columns: all of it in a line each, with split and row.
        SettingError: It cannot be had; a split is not there; a key of `scale` is no depth.
    """
    check_scale(settings.scale, kinds)
    loaded = load_splits(settings)
    places = {split: place for split, place in settings.places.items() if split in ("train", *splits)}
    parts = parts_of(settings.path, loaded, places)
    once = {part.spec: part for part in parts.values()}
    mistakes = Mistakes()
    _check_columns(settings, once.values(), kinds, mistakes)
    mistakes.check()
    values = {spec: _values(part, kinds, mistakes) for spec, part in once.items()}
    division = _division(settings, parts, mistakes)
    mistakes.check()
    for split in splits:
        if split not in division:
            raise SettingError(f"data.{split}", "this split is required here")
    languages = _learn(division, values, kinds, mistakes)
    for spec, part in once.items():
        check_cells(part.where, values[spec], languages, mistakes)
        _check_images(part, settings.image, mistakes)
    mistakes.check()
    made: dict[str, HubSet] = {}
    for split in splits:
        part, rows = division[split]
        own = {label: column.take(rows) for label, column in values[part.spec].items()}
        made[split] = HubSet(settings, part, rows, kinds, own, languages, loaded.folders)
    return made


def hub_columns(settings: HuggingFaceData) -> tuple[str, ...]:
    """The columns of the training split.

    Raises:
        DataError, SettingError: As `open_hub`.
    """
    (part,) = parts_of(settings.path, load_splits(settings), {"train": settings.train}).values()
    return tuple(part.dataset.features)


def _check_columns(
    settings: HuggingFaceData, parts: Iterable[HubRows], kinds: Mapping[str, LabelKind], mistakes: Mistakes
) -> None:
    if IMAGE in kinds:
        mistakes.add(f"{IMAGE!r} is the name of the images, and of no label")
    of_split = [settings.split.column_name] if settings.split is not None else []
    keys = {settings.image: "data.image: ", **dict.fromkeys(of_split, "data.split.column: ")}
    for part in parts:
        features = part.dataset.features
        for name in dict.fromkeys([*kinds, settings.image, *of_split]):
            if name not in features:
                label = None if name in keys else name
                mistakes.add(f"{keys.get(name, '')}{part} has no column {name!r}", name, features, label)
            elif name in kinds and (fault := fault_of(library(), features[name], kinds[name])):
                mistakes.add(f"{part}: {name}: {fault}")
            elif name == settings.image and (fault := fault_of(library(), features[name], None)):
                mistakes.add(f"data.image: {part}: {name}: {fault}")


def _values(part: HubRows, kinds: Mapping[str, LabelKind], mistakes: Mistakes) -> dict[str, Coded]:
    """The columns of labels that lie in cells."""
    values = {}
    for label, kind in kinds.items():
        if kind not in FILE_KINDS:
            try:
                values[label] = coded(part.dataset.data.column(label), kind)
            except TypeError as error:
                mistakes.add(f"{part}: {label}: expected text, numbers or lists of them, got {error}")
    return values


def _division(settings: HuggingFaceData, parts: Mapping[str, HubRows], mistakes: Mistakes) -> _Division:
    """Of each split, its part of the data set, and the rows in it."""
    if settings.split is None:
        return {split: (part, np.arange(len(part.dataset), dtype=np.int64)) for split, part in parts.items()}
    part = parts["train"]
    cells = [str(value or "") for value in part.dataset.data.column(settings.split.column_name).to_pylist()]
    rows_of = divide(settings.split, cells, str(part), part.where, mistakes)
    return {split: (part, rows) for split, rows in rows_of.items()}


def _learn(
    division: _Division, values: Mapping[str, Mapping[str, Coded]], kinds: Mapping[str, LabelKind], mistakes: Mistakes
) -> dict[str, Language]:
    part, rows = division["train"]
    known = _given(part, kinds)
    for other in {each.spec: each for each, _ in division.values()}.values():
        own = _given(other, kinds)
        for label in kinds:
            if own.get(label) != known.get(label):
                mistakes.add(f"{other}: {label}: expected the same class names in the same order as in {part.spec}")
    return learn_languages(str(part), values[part.spec], rows, kinds, mistakes, known)


def _given(part: HubRows, kinds: Mapping[str, LabelKind]) -> dict[str, Language]:
    """The languages of columns whose features name the classes."""
    found = {label: given_language(library(), part.dataset.features[label], kind) for label, kind in kinds.items()}
    return {label: language for label, language in found.items() if language is not None}


def _check_images(part: HubRows, column: str, mistakes: Mistakes) -> None:
    import pyarrow
    import pyarrow.compute as compute

    stored = part.dataset.data.column(column)
    lacks = compute.is_null(stored)
    if pyarrow.types.is_struct(stored.type):
        neither = [compute.is_null(compute.struct_field(stored, name)) for name in ("bytes", "path")]
        lacks = compute.or_(lacks, compute.and_(*neither))
    for row in np.flatnonzero(lacks.to_numpy()).tolist():
        mistakes.add(f"{part.where(row)}: {column}: expected an image, got none")
