"""A split in shards: samples whose members are images, masks, class numbers, or JSON with labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mtl.data.files.blob import Blob
from mtl.data.files.fileset import IMAGE
from mtl.data.files.shards.index import Index
from mtl.data.files.shards.labels import Place
from mtl.data.files.table.cells import Language
from mtl.data.files.table.coded import Coded
from mtl.data.files.table.records import RecordSet
from mtl.runtime.fingerprint import fingerprint, fingerprint_of_json
from mtl.tasks.base import LabelKind


class ShardSet(RecordSet):
    """One split."""

    def __init__(
        self,
        index: Index,
        rows: NDArray[np.int64],
        kinds: Mapping[str, LabelKind],
        places: Mapping[str, Place],
        values: Mapping[str, Coded],
        languages: Mapping[str, Language],
        scale: Mapping[str, float],
    ) -> None:
        """Args:
        index: Where samples lie.
        rows: Which of them.
        kinds: What each label is.
        places: Where the image, and labels that are no text, lie in a sample.
        values: The other labels, of these samples.
        languages: How these are parsed.
        scale: Metres of one unit of a depth, by label; 1 if not given.
        """
        super().__init__(kinds, values, languages, scale)
        self._index, self._rows, self._places = index, rows, dict(places)
        self._members = {name: index.members(place.extensions) for name, place in places.items()}

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, index: int) -> str:
        return self._index.where(int(self._rows[index]))

    def source(self, index: int, name: str) -> Blob | None:
        return self._index.blob(int(self._rows[index]), self._members[name], self._places[name].extensions)

    def files(self, index: int) -> Mapping[str, Path]:  # noqa: ARG002  none has a file of its own
        return {}

    def identity(self, items: Sequence[int], name: str = IMAGE) -> str | None:
        """A digest of the shards' paths, sizes and times, and of where the members lie in them."""
        if name in self._values:
            return super().identity(items, name)
        rows, members = self._rows[list(items)], self._members[name]
        where = [fingerprint(torch.from_numpy(each)) for each in (rows, members.offsets[rows], members.sizes[rows])]
        return fingerprint_of_json([self._index.stamps, where])
