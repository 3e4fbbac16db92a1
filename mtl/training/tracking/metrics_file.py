"""`metrics.jsonl`: one flat object a line, written whatever else shows the run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from mtl.runtime.console import logger
from mtl.runtime.files import without_nan

# Made once: `json.dumps` makes one for each row.
_ENCODER = json.JSONEncoder(allow_nan=False)


class MetricsFile:
    """The rows of a run."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def append(self, rows: Sequence[Mapping[str, float | int | str]]) -> None:
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write("".join(f"{_line(row)}\n" for row in rows))

    def flush_to_disk(self) -> int:
        """Forces the rows to disk; returns the file's size in bytes."""
        if not self._file.exists():
            return 0
        with self._file.open("rb") as stream:
            os.fsync(stream.fileno())
            return os.fstat(stream.fileno()).st_size

    def cut_back(self, num_bytes: int) -> None:
        """Removes what was logged after a checkpoint: it is going to be logged again."""
        found = self._file.read_bytes() if self._file.exists() else b""
        if len(found) < num_bytes:
            logger.warning(
                f"{self._file} has lost rows: {len(found):,} bytes are left of {num_bytes:,}; new ones follow"
            )
            # After half a row, the next one could not be read either.
            num_bytes = found.rfind(b"\n") + 1
        if len(found) > num_bytes:
            os.truncate(self._file, num_bytes)


def _line(row: Mapping[str, float | int | str]) -> str:
    try:
        return _ENCODER.encode(row)
    except ValueError:
        return _ENCODER.encode(without_nan(row))
