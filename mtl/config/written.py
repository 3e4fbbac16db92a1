"""What of a configuration was written down, and where: command line, file, or a file that it is based on."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

from pydantic import BaseModel

from mtl.config.source import COMMAND_LINE, KeyPath, Source


class Rank(IntEnum):
    """Which place goes before which: the command line before the file, the file before what it is based on."""

    BASE = 0
    FILE = 1
    COMMAND_LINE = 2


def rank_of(source: Source, path: KeyPath) -> Rank:
    """The rank of the place where a key, or the nearest one around it, was written."""
    place = source.where(path)
    if place == COMMAND_LINE:
        return Rank.COMMAND_LINE
    return Rank.FILE if _file(place) == _file(source.where(())) else Rank.BASE


def _file(place: str) -> str:
    return place.rpartition(":")[0]


def is_written(source: Source, path: KeyPath) -> bool:
    """Whether a key was written down, by anyone anywhere, in place of left to its default."""
    return path in source.places


def is_default(config: BaseModel, path: KeyPath) -> bool:
    """Whether a key has the value that it would have if it were left out; keys of no model have none."""
    *around, last = path
    at: Any = config
    for key in around:
        at = getattr(at, str(key)) if isinstance(at, BaseModel) else at[key]
    field = type(at).model_fields.get(str(last)) if isinstance(at, BaseModel) else None
    return field is not None and bool(getattr(at, str(last)) == field.default)
