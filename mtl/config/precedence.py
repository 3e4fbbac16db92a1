"""Which of two written keys overrides the other: command line, file, or a file that it is based on."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

from pydantic import BaseModel

from mtl.config.yaml_source import COMMAND_LINE, ConfigSource, KeyPath


class Precedence(IntEnum):
    """The command line overrides the file, and the file overrides the files that it is based on."""

    BASE = 0
    FILE = 1
    COMMAND_LINE = 2


def precedence_of(source: ConfigSource, path: KeyPath) -> Precedence:
    """The precedence of the place where a key, or the nearest one around it, was written."""
    place = source.where(path)
    if place == COMMAND_LINE:
        return Precedence.COMMAND_LINE
    return Precedence.FILE if _file(place) == _file(source.where(())) else Precedence.BASE


def _file(place: str) -> str:
    return place.rpartition(":")[0]


def is_written(source: ConfigSource, path: KeyPath) -> bool:
    """Whether a key was written down anywhere; if not, it has its default."""
    return path in source.places


def is_default(config: BaseModel, path: KeyPath) -> bool:
    """Whether a key has its default value; False for keys that are no field of a model."""
    *around, last = path
    at: Any = config
    for key in around:
        at = getattr(at, str(key)) if isinstance(at, BaseModel) else at[key]
    field = type(at).model_fields.get(str(last)) if isinstance(at, BaseModel) else None
    return field is not None and bool(getattr(at, str(last)) == field.default)
