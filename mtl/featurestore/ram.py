"""Features in memory."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mtl.featurestore.base import FeatureStore, Field, new_places


class RamStore(FeatureStore):
    """Rows in tensors that are taken at the first write; the system gives their pages as rows are written."""

    def __init__(self, num_rows: int, fields: Sequence[Field], pin_memory: bool = False) -> None:
        super().__init__(num_rows, fields, pin_memory)
        self._lock = threading.Lock()
        self._is_closed = self._is_whole = False
        self._rows: list[Tensor] = []
        self._present = np.zeros(num_rows, dtype=np.bool_)

    @property
    def num_present(self) -> int:
        return int(np.count_nonzero(self._present))

    def read(self, indices: Tensor) -> list[Tensor] | None:
        # In a step of small heads every call counts. Of a store that is whole, torch checks the range by itself.
        is_plain = self._is_whole and indices.dtype is torch.int64 and indices.ndim == 1 and not indices.is_cuda
        rows = self._rows
        if not is_plain:
            wanted = self._checked(indices)
            if not rows or not self._present[wanted].all():
                return None
            indices = torch.from_numpy(wanted)
        with torch.inference_mode(False):
            return [self._batch_of(each, indices) for each in rows]

    def write(self, indices: Tensor, tensors: Sequence[Tensor]) -> None:
        wanted = self._checked(indices)
        self._check_fit(tensors, len(wanted))
        with self._lock:
            places = new_places(wanted, self._present)
            if self._is_closed or not len(places):
                return
            if not self._rows:
                # Tensors made in inference mode could not be written later.
                with torch.inference_mode(False):
                    self._rows = [torch.empty(self.num_rows, *field.shape, dtype=field.dtype) for field in self.fields]
            where = torch.from_numpy(wanted[places])
            for kept, part in zip(self._rows, self._new_rows(tensors, places), strict=True):
                kept[where] = part
            # Last, so that no reader takes a row that is incomplete.
            self._present[wanted[places]] = True
            self._is_whole = bool(self._present.all())

    def close(self) -> None:
        with self._lock:
            self._is_closed, self._is_whole = True, False
            self._rows, self._present = [], np.zeros(self.num_rows, dtype=np.bool_)

    def _batch_of(self, kept: Tensor, indices: Tensor) -> Tensor:
        if not self.pin_memory:
            return kept.index_select(0, indices)
        batch = torch.empty(len(indices), *kept.shape[1:], dtype=kept.dtype, pin_memory=True)
        return torch.index_select(kept, 0, indices, out=batch)
