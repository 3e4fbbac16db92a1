"""Reads wandb's offline file: 32 KiB blocks of checksummed records, each a protobuf message."""

from __future__ import annotations

import json
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEADER = 32768, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


class IncompleteRecordError(Exception):
    """The file's last record is not whole: it is being written, or was damaged."""


def read_records(file: Path) -> Iterator[Record]:
    content = file.read_bytes()
    if len(content) < HEADER:
        raise IncompleteRecordError(file)
    assert content[:4] == b":W&B"
    position, parts = HEADER, []
    while position < len(content):
        if BLOCK - position % BLOCK < HEADER:
            position += BLOCK - position % BLOCK
            continue
        if len(content) - position < HEADER:
            raise IncompleteRecordError(file)
        checksum, length, kind = struct.unpack("<IHB", content[position : position + HEADER])
        data = content[position + HEADER : position + HEADER + length]
        if zlib.crc32(bytes([kind]) + data) != checksum:
            raise IncompleteRecordError(file)
        position += HEADER + length
        assert kind in (FULL, FIRST, MIDDLE, LAST)
        parts.append(data)
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


def of_kind(file: Path, kind: str) -> list[Any]:
    """The content of all records of a kind, such as `metric` or `alert`."""
    return [getattr(record, kind) for record in read_records(file) if record.WhichOneof("record_type") == kind]


def history(file: Path) -> list[dict[str, Any]]:
    """What was logged, row by row."""
    rows = []
    for record in read_records(file):
        if record.WhichOneof("record_type") == "history":
            rows.append(
                {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            )
    return rows


def config(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for record in read_records(file):
        kind = record.WhichOneof("record_type")
        if kind in ("run", "config"):
            updates = record.run.config.update if kind == "run" else record.config.update
            found |= {item.key: json.loads(item.value_json) for item in updates}
    return found


def summary(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for record in read_records(file):
        if record.WhichOneof("record_type") == "summary":
            found |= {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.summary.update}
    return found


def offline_file(folder: Path, timeout_s: float = 600) -> Path:
    """The file of a run that has been finished; wandb's own process writes it, perhaps a moment later."""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + timeout_s
    while not _is_complete(file):
        assert time.monotonic() < deadline, f"{file} is not complete after {timeout_s} s"
        time.sleep(0.05)
    return file


def _is_complete(file: Path) -> bool:
    """Whether every record is whole and the last ones, among them that of the exit, are there."""
    try:
        return "exit" in [record.WhichOneof("record_type") for record in read_records(file)]
    except IncompleteRecordError:
        return False
