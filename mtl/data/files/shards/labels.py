"""Where labels lie in samples, and the cells that those which are text or JSON make."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mtl.config.hub_data import WebDatasetData
from mtl.data.cache import DataError
from mtl.data.files.label_files import FILE_KINDS
from mtl.data.files.mistakes import Mistakes
from mtl.data.files.shards.index import Index, Members
from mtl.data.files.table.coded import Coded
from mtl.data.files.table.values import cell_of
from mtl.runtime.text import in_bytes, with_article
from mtl.tasks.base import LabelKind

_TEXT, _JSON = ("cls", "txt", "text"), ("json", "jsn")
# Larger ones are no labels; in bytes.
_LARGEST = 16_000_000


@dataclass(frozen=True)
class Place:
    """Where a label lies.

    Attributes:
        extensions: Of the member; the first of them that a sample has.
        field: Of the JSON in it; None if the member is the label.
    """

    extensions: tuple[str, ...]
    field: str | None = None


def is_json(extension: str) -> bool:
    return extension.rpartition(".")[2] in _JSON


def listed(written: str) -> tuple[str, ...]:
    """The extensions that a text such as `jpg;png` names, as the index has them."""
    return tuple(filter(None, (each.strip().lstrip(".").lower() for each in written.split(";"))))


def places_of(
    settings: WebDatasetData, kinds: Mapping[str, LabelKind], index: Index, mistakes: Mistakes
) -> dict[str, Place]:
    """Where each label lies, by what the training shards have."""
    places = {}
    for label, kind in kinds.items():
        extensions = listed(settings.labels.get(label, label))
        start = f"data.labels.{label}: " if label in settings.labels else ""
        is_there = any(each in index.columns for each in extensions)
        if not is_there and not start and kind not in FILE_KINDS and any(each in index.columns for each in _JSON):
            places[label] = Place(_JSON, label)
        elif not is_there:
            what = f"no sample of {settings.train} has a member {' or '.join(extensions)}"
            there = sorted(index.columns)
            word, own = extensions[0] if extensions else "", None if start else label
            mistakes.add(f"{start}{what}; there are {', '.join(there)}", word, there, own)
        elif fault := _fault_of(extensions, kind):
            mistakes.add(f"{start or f'{label}: '}the task learns {fault}, got {';'.join(extensions)}")
        else:
            places[label] = Place(extensions, label if is_json(extensions[0]) else None)
    return places


def _fault_of(extensions: Sequence[str], kind: LabelKind) -> str:
    last = {each.rpartition(".")[2] for each in extensions}
    if kind in FILE_KINDS:
        words = kind if kind == "normals" else with_article(kind)
        return f"{words}; expected a picture or npy" if last & {*_TEXT, *_JSON} else ""
    if not (last <= set(_TEXT) or last <= set(_JSON)):
        return f"{with_article(kind) if kind == 'class' else kind}; expected cls, txt or json"
    return ""


def read_cells(
    index: Index, places: Mapping[str, Place], kinds: Mapping[str, LabelKind], mistakes: Mistakes
) -> tuple[dict[str, Coded], set[str]]:
    """The labels that are text or JSON, of all samples; each member is read once.

    Returns:
        The cells by label, and the fields that the JSON has.
    """
    by_extensions: dict[tuple[str, ...], list[str]] = {}
    for label, place in places.items():
        if kinds[label] not in FILE_KINDS:
            by_extensions.setdefault(place.extensions, []).append(label)
    cells: dict[str, list[str]] = {
        label: [""] * len(index.keys) for labels in by_extensions.values() for label in labels
    }
    fields: set[str] = set()
    for extensions, labels in by_extensions.items():
        members = index.members(extensions)
        for sample in np.flatnonzero(members.offsets >= 0).tolist():
            try:
                found = _read(index, members, sample, extensions)
                if isinstance(found, dict):
                    fields.update(found)
                for label in labels:
                    cells[label][sample] = _cell(found, label, kinds[label])
            except DataError as error:
                mistakes.add(f"{index.where(sample)}: {error}")
    return {label: Coded.of(column) for label, column in cells.items()}, fields


def _read(index: Index, members: Members, sample: int, extensions: Sequence[str]) -> str | dict[str, Any]:
    """The text of a member, or the fields of one that is JSON."""
    if members.sizes[sample] > _LARGEST:
        raise DataError(
            f"{extensions[0]}: expected at most {in_bytes(_LARGEST)}, got {in_bytes(int(members.sizes[sample]))}"
        )
    blob = index.blob(sample, members, extensions)
    assert blob is not None and isinstance(blob.content, bytes)
    try:
        text = blob.content.decode()
        found = json.loads(text) if is_json(extensions[0]) else text.strip()
    except UnicodeDecodeError as error:
        raise DataError(f"{blob}: expected text in UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{blob}: expected JSON, got an error: {error}") from error
    if not isinstance(found, str if not is_json(extensions[0]) else dict):
        raise DataError(f"{blob}: expected a JSON object, with a field for each label, got {type(found).__name__}")
    return found


def _cell(found: str | dict[str, Any], label: str, kind: LabelKind) -> str:
    if isinstance(found, str):
        return found
    try:
        return cell_of(found.get(label), ";" if kind == "tags" else "")
    except TypeError as error:
        raise DataError(f"{label}: expected text, a number or a list of them, got {error}") from error
