"""Tensors of many images in one `.safetensors` file, written and read some images at a time: in constant memory."""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtl.checkpoint.tensor_file import read_header
from mtl.runtime.files import all_bytes

Arrays = Mapping[str, NDArray[np.generic]]
# Their names in the header of such a file (huggingface/safetensors, "Format").
_TYPES = {"U8": np.uint8, "I64": np.int64, "F16": np.float16, "F32": np.float32}
_NAMES = {np.dtype(each): name for name, each in _TYPES.items()}


def write_rows(file: Path, num: int, blocks: Iterable[Arrays]) -> None:
    """Writes tensors, whose first axis is the images', block by block.

    Args:
        file: The file, which is made.
        num: Images in all; what the last block has beyond them is left out.
        blocks: Arrays by name, the same names, types and other axes in each.

    Raises:
        OSError: The file cannot be written.
    """
    offsets: dict[str, int] = {}
    start = 0
    with file.open("wb") as stream:
        for block in blocks:
            if not offsets:
                offsets = _write_header(stream, num, block)
            for name, array in block.items():
                rows = np.ascontiguousarray(array[: num - start])
                stream.seek(offsets[name] + start * array[0].nbytes)
                stream.write(rows.data.cast("B") if rows.ndim else rows.tobytes())
            start += min(len(next(iter(block.values()))), num - start)


def _write_header(stream: Any, num: int, block: Arrays) -> dict[str, int]:
    """Writes what a file of such tensors begins with; returns where each tensor begins."""
    begin, header = 0, {}
    # The widest elements first, so that all are aligned.
    for name, array in sorted(block.items(), key=lambda item: (-item[1].itemsize, item[0])):
        end = begin + num * array[0].nbytes
        header[name] = {"dtype": _NAMES[array.dtype], "shape": [num, *array.shape[1:]], "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    stream.truncate(8 + len(text) + begin)
    return {name: 8 + len(text) + own["data_offsets"][0] for name, own in header.items()}


class RowsFile:
    """Such a file, of which rows are read by `pread`: the process does not grow with it.

    Attributes:
        shapes: The shape of each tensor, by name, the first axis the images'.
    """

    def __init__(self, file: Path) -> None:
        """Raises:
        TensorFileError: The file is damaged.
        OSError: It cannot be read.
        """
        header = read_header(file)
        self._file = os.open(file, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self.shapes = {name: own.shape for name, own in header.items()}
        self._begins = {name: own.begin for name, own in header.items()}
        self._types = {name: np.dtype(_TYPES[own.dtype]) for name, own in header.items()}

    def read(self, name: str, indices: Tensor) -> Tensor:
        """Rows of one tensor.

        Args:
            name: Which one.
            indices: "b", int64.

        Raises:
            OSError: The file cannot be read.
        """
        shape, dtype = self.shapes[name][1:], self._types[name]
        size = math.prod(shape) * dtype.itemsize
        rows = np.empty((len(indices), size), np.uint8)
        wanted = indices.tolist()
        place = 0
        while place < len(wanted):
            end = place + 1
            # Rows that lie next to each other are read at once.
            while end < len(wanted) and wanted[end] == wanted[end - 1] + 1:
                end += 1
            buffer = rows[place:end].data.cast("B")
            if all_bytes(os.preadv, self._file, [buffer], self._begins[name] + wanted[place] * size) != len(buffer):
                raise OSError(0, "the file is shorter than it was")
            place = end
        return torch.from_numpy(rows.view(dtype).reshape(len(wanted), *shape))
