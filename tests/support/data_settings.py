"""The settings model of each data set, by its name."""

from __future__ import annotations

from typing import get_args

from pydantic import Tag

from mtl.config import DataConfig
from mtl.config.data_sets import AnyDataConfig


def _by_name() -> dict[str, type[DataConfig]]:
    members = (get_args(member) for member in get_args(get_args(AnyDataConfig)[0]))
    return {mark.tag: kind for kind, *marks in members for mark in marks if isinstance(mark, Tag)}


SETTINGS = _by_name()
