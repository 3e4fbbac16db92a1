"""Opens shards: members are indexed, labels that are text or JSON are read and checked, and no image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mtl.config import SettingError
from mtl.config.file_data import SplitName
from mtl.config.hub_data import WebDatasetData
from mtl.data.cache import default_cache_dir
from mtl.data.files.fileset import IMAGE
from mtl.data.files.label_files import FILE_KINDS, check_scale
from mtl.data.files.mistakes import Mistakes
from mtl.data.files.shards.index import Index, index_shards
from mtl.data.files.shards.kept import KeptIndices
from mtl.data.files.shards.labels import Place, listed, places_of, read_cells
from mtl.data.files.shards.names import shard_files
from mtl.data.files.shards.shards import ShardSet
from mtl.data.files.table.coded import check_cells, learn_languages
from mtl.data.files.table.division import divide
from mtl.tasks.base import LabelKind


def open_shards(
    settings: WebDatasetData, kinds: Mapping[str, LabelKind], splits: Sequence[SplitName]
) -> dict[str, ShardSet]:
    """Opens splits of a data set in shards.

    Args:
        settings: Where they are.
        kinds: What each label is.
        splits: Which splits.

    Raises:
        DataError: Something is wrong with shards or labels: all of it in a line each, with shard and key.
        SettingError: Shards cannot be named; a split is not there; a key of `scale` is no depth; webdataset is not
            installed.
    """
    check_scale(settings.scale, kinds)
    mistakes = Mistakes()
    if IMAGE in kinds:
        mistakes.add(f"{IMAGE!r} is the name of the images, and of no label")
    division = _division(settings, splits, mistakes)
    mistakes.check()
    training, rows = division["train"]
    places = places_of(settings, kinds, training, mistakes)
    mistakes.check()
    indices = {index.files: index for index, _ in division.values()}
    read = {files: read_cells(index, places, kinds, mistakes) for files, index in indices.items()}
    values, fields = read[training.files]
    for label, place in places.items():
        if place.field is not None and label not in fields:
            mistakes.add(f"{settings.train}: no {place.extensions[0]} has the field {label!r}", label, fields, label)
    mistakes.check()
    languages = learn_languages(settings.train, values, rows, kinds, mistakes)
    image = Place(listed(settings.image))
    for files, index in indices.items():
        check_cells(index.where, read[files][0], languages, mistakes)
        _check_images(index, image, mistakes)
    mistakes.check()
    in_members = {IMAGE: image, **{label: place for label, place in places.items() if kinds[label] in FILE_KINDS}}
    made: dict[str, ShardSet] = {}
    for split in splits:
        index, rows = division[split]
        own = {label: column.take(rows) for label, column in read[index.files][0].items()}
        made[split] = ShardSet(index, rows, kinds, in_members, own, languages, settings.scale)
    return made


def _division(
    settings: WebDatasetData, splits: Sequence[SplitName], mistakes: Mistakes
) -> dict[str, tuple[Index, NDArray[np.int64]]]:
    """Of each split, the samples of its shards, and which of them are in it."""
    names = {split: place for split, place in settings.places.items() if split in ("train", *splits)}
    files = {split: tuple(shard_files(place, f"data.{split}")) for split, place in names.items()}
    cache = Path(settings.cache_dir).expanduser() if settings.cache_dir else default_cache_dir()
    kept = KeptIndices(cache / "shards")
    indices = {each: index_shards(each, kept, mistakes) for each in dict.fromkeys(files.values())}
    rows_of: dict[str, tuple[Index, NDArray[np.int64]]] = {}
    if settings.split is None:
        for split, each in files.items():
            rows_of[split] = (indices[each], np.arange(len(indices[each].keys), dtype=np.int64))
    else:
        index = indices[files["train"]]
        divided = divide(settings.split, index.keys, settings.train, index.where, mistakes)
        rows_of = {split: (index, rows) for split, rows in divided.items()}
    for split in splits:
        if split not in rows_of:
            raise SettingError(f"data.{split}", "this split is required here")
    return rows_of


def _check_images(index: Index, image: Place, mistakes: Mistakes) -> None:
    expected = f"member {' or '.join(image.extensions)}"
    if not any(each in index.columns for each in image.extensions):
        what = f"data.image: no sample from {index.files[0]} on has a {expected}"
        there = sorted(index.columns)
        mistakes.add(f"{what}; there are {', '.join(there)}", image.extensions[0] if image.extensions else "", there)
        return
    for sample in np.flatnonzero(index.members(image.extensions).offsets < 0).tolist():
        if mistakes.is_full:
            mistakes.add("")
            continue
        own = [extension for extension, column in index.columns.items() if sample in column.samples]
        mistakes.add(f"{index.where(sample)}: expected a {expected}, the image, got {', '.join(own)}")
