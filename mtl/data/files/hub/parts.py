"""The rows of a split: of one split of the data set, of a part of one, or of several."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mtl.config import SettingError
from mtl.config.file_data import SplitName
from mtl.data.files.hub.library import Loaded, library
from mtl.runtime.fingerprint import fingerprint_of_json
from mtl.runtime.text import hint


@dataclass(frozen=True)
class HubRows:
    """Rows of a data set, one after the other.

    Attributes:
        path: The data set's.
        spec: What was asked for.
        dataset: The `datasets.Dataset` of these rows.
        starts: Where each stretch of rows begins.
        origins: The split that each stretch is from, and the first of its rows there.
        digest: Another one whenever the data is.
    """

    path: str
    spec: str
    dataset: Any
    starts: tuple[int, ...]
    origins: tuple[tuple[str, int], ...]
    digest: str

    def __str__(self) -> str:
        return f"{self.path}, {self.spec}"

    def where(self, row: int) -> str:
        """A row as messages name it: by its number in its split, from 0, as the library counts."""
        place = bisect_right(self.starts, row) - 1
        split, first = self.origins[place]
        return f"{self.path}, {split}[{row - self.starts[place] + first}]"


def part_of(path: str, loaded: Loaded, spec: str, key: str) -> HubRows:
    """The rows that a split's name asks for.

    Args:
        path: The data set's.
        loaded: Its splits.
        spec: A name, a slice of it, or several joined by `+`.
        key: The key under which that is written.

    Raises:
        SettingError: There is no such split, or it cannot be sliced in that way.
    """
    datasets = library()
    lengths = {name: len(split) for name, split in loaded.splits.items()}
    for name in (each.partition("[")[0].strip() for each in re.split(r"\+", spec)):
        if name not in lengths:
            there = f"it has {', '.join(lengths)}"
            raise SettingError(key, f"{path} has no split {name!r}; {there}{hint(name, lengths)}")
    try:
        stretches = datasets.ReadInstruction.from_spec(spec).to_absolute(lengths)
    except ValueError as error:
        raise SettingError(key, f"expected a split, such as train or train[:90%], got {spec}: {error}") from error
    found, starts, origins, length = [], [], [], 0
    for each in stretches:
        found.append(loaded.splits[each.splitname].select(range(each.from_, each.to)))
        starts.append(length)
        origins.append((each.splitname, each.from_))
        length += each.to - each.from_
    try:
        dataset = found[0] if len(found) == 1 else datasets.concatenate_datasets(found)
    except ValueError as error:
        raise SettingError(key, f"{spec}: the splits differ in their columns: {error}") from error
    digest = fingerprint_of_json([[loaded.digests[name], name, first] for name, first in origins])
    return HubRows(path, spec, dataset, tuple(starts), tuple(origins), digest)


def parts_of(path: str, loaded: Loaded, places: Mapping[SplitName, str]) -> dict[str, HubRows]:
    """The rows of each split, by the name that it has in the settings; one that is asked for twice is made once."""
    made: dict[str, HubRows] = {}
    for name, spec in places.items():
        if spec not in made:
            made[spec] = part_of(path, loaded, spec, f"data.{name}")
    return {name: made[spec] for name, spec in places.items()}
