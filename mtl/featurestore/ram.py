"""Features in memory."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from mtl.featurestore.base import Bytes, FeatureStore, Field, new_places


class RamStore(FeatureStore):
    """Rows in arrays that are taken at the first write; the system gives their pages as rows are written."""

    def __init__(self, num_rows: int, fields: Sequence[Field], pin_memory: bool = False) -> None:
        super().__init__(num_rows, fields, pin_memory)
        self._lock = threading.Lock()
        self._is_closed = False
        self._memory: list[Bytes] = []
        self._present = np.zeros(num_rows, dtype=np.bool_)

    @property
    def num_present(self) -> int:
        return int(np.count_nonzero(self._present))

    def read(self, indices: Tensor) -> list[Tensor] | None:
        wanted = self._checked(indices)
        memory, present = self._memory, self._present
        if not memory or not present[wanted].all():
            return None
        batch, parts = self._new_batch(len(wanted))
        for kept, part in zip(memory, parts, strict=True):
            # "clip" fills `part` directly; the default would fill a copy first. All indices were checked.
            np.take(kept, wanted, axis=0, out=part, mode="clip")
        return batch

    def write(self, indices: Tensor, tensors: Sequence[Tensor]) -> None:
        wanted = self._checked(indices)
        self._check_fit(tensors, len(wanted))
        with self._lock:
            places = new_places(wanted, self._present)
            if self._is_closed or not len(places):
                return
            if not self._memory:
                self._memory = [np.empty((self.num_rows, field.num_bytes), np.uint8) for field in self.fields]
            for kept, part in zip(self._memory, self._to_bytes(tensors, places), strict=True):
                kept[wanted[places]] = part
            # Last, so that no reader takes a row that is incomplete.
            self._present[wanted[places]] = True

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            self._memory, self._present = [], np.zeros(self.num_rows, dtype=np.bool_)
