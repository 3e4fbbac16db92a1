"""The interface of all feature stores, and the form of their rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Bytes = NDArray[np.uint8]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Field:
    """One tensor of the features of one image: its shape without the batch, and the dtype it is kept in."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Of one image."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class FeatureStore(ABC):
    """Rows of features by image index.

    Every method may be called from several threads at once. A row that is there stays as it is: writing it again
    changes nothing, so that no reader gets a row that is half old and half new.
    """

    def __init__(self, num_rows: int, fields: Sequence[Field], pin_memory: bool = False) -> None:
        """A store without rows.

        Args:
            num_rows: How many images there are; indices are 0 to num_rows - 1.
            fields: The tensors of one image.
            pin_memory: Whether rows are read into pinned memory, so that copying them to a GPU need not wait for it.
        """
        self.num_rows = num_rows
        self.fields = tuple(fields)
        self.pin_memory = pin_memory
        # Whether it has no rows and takes none any more.
        self.is_disabled = False

    @property
    def row_bytes(self) -> int:
        """Bytes of the features of one image."""
        return sum(field.num_bytes for field in self.fields)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, when they are there."""
        return self.num_rows * self.row_bytes

    @property
    @abstractmethod
    def num_present(self) -> int:
        """How many rows are there."""

    @property
    def is_complete(self) -> bool:
        """All rows are there."""
        return self.num_present == self.num_rows

    @abstractmethod
    def read(self, indices: Tensor) -> list[Tensor] | None:
        """Reads rows.

        Args:
            indices: "b", integers, in any order, repeated or not.

        Returns:
            For every field "b ...", in its dtype, on the CPU, bit for bit what was written; fresh memory, which
            training may use even if it is read in inference mode. None if a row is not there or is damaged: compute
            the features.
        """

    @abstractmethod
    def write(self, indices: Tensor, tensors: Sequence[Tensor]) -> None:
        """Writes rows; those that are there already are left as they are.

        Args:
            indices: "b", integers, in any order, repeated or not.
            tensors: For every field "b ...", on any device and in any memory layout. Another float dtype than the
                field's is converted.
        """

    @abstractmethod
    def close(self) -> None:
        """Lets go of everything; a store that is closed has no rows and takes none. May be called again."""

    def _checked(self, indices: Tensor) -> Indices:
        assert indices.ndim == 1 and not indices.is_floating_point() and indices.dtype is not torch.bool, indices
        wanted: Indices = indices.detach().cpu().numpy().astype(np.int64)
        assert not ((wanted < 0) | (wanted >= self.num_rows)).any(), f"expected 0 to {self.num_rows - 1}, got {wanted}"
        return wanted

    def _check_fit(self, tensors: Sequence[Tensor], length: int) -> None:
        expected = [((length, *field.shape), field.dtype) for field in self.fields]
        got = [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        assert [shape for shape, _ in got] == [shape for shape, _ in expected], f"expected {expected}, got {got}"
        for (_, there), (_, dtype) in zip(got, expected, strict=True):
            is_convertible = there.is_floating_point and dtype.is_floating_point
            assert there == dtype or is_convertible, f"expected {expected}, got {got}"

    def _new_rows(self, tensors: Sequence[Tensor], places: Indices) -> list[Tensor]:
        """For every field "b ..." of some places of a batch, contiguous, on the CPU."""
        parts = []
        for tensor, field in zip(tensors, self.fields, strict=True):
            chosen = tensor.detach()
            if len(places) < len(chosen):
                chosen = chosen[torch.from_numpy(places).to(chosen.device)]
            # The device converts, so that less is copied from it.
            parts.append(chosen.to(field.dtype).contiguous().cpu())
        return parts

    def _to_bytes(self, tensors: Sequence[Tensor], places: Indices) -> list[Bytes]:
        """For every field "b bytes" of some places of a batch."""
        rows = self._new_rows(tensors, places)
        return [_memory_of(each, field) for each, field in zip(rows, self.fields, strict=True)]

    def _new_batch(self, length: int) -> tuple[list[Tensor], list[Bytes]]:
        """Tensors to be filled, and their bytes: for every field "b bytes"."""
        # A tensor made in inference mode could not be saved for backward later.
        with torch.inference_mode(False):
            batch = [
                torch.empty(length, *field.shape, dtype=field.dtype, pin_memory=self.pin_memory)
                for field in self.fields
            ]
            return batch, [_memory_of(tensor, field) for tensor, field in zip(batch, self.fields, strict=True)]


def _memory_of(tensor: Tensor, field: Field) -> Bytes:
    """The memory of a contiguous tensor "b ..." on the CPU as "b bytes"."""
    memory: Bytes = tensor.view(torch.uint8).reshape(len(tensor), field.num_bytes).numpy()
    return memory


def new_places(wanted: Indices, present: NDArray[np.bool_]) -> Indices:
    """The places in a batch of the rows that are not there yet, each row once."""
    _, first = np.unique(wanted, return_index=True)
    places: Indices = np.sort(first[~present[wanted[first]]]).astype(np.int64)
    return places
