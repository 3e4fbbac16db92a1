"""Names of shards and of their members, as webdataset has them; it is an extra."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from mtl.config import SettingError
from mtl.data.files.extras import from_extra
from mtl.runtime.text import count, shorten

_MOST_SHARDS = 100_000
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?\}")


def split_name() -> Callable[[str], tuple[str | None, str | None]]:
    """Returns what splits a member's name into key and extension, at the first dot of its last part; None without one.

    Raises:
        SettingError: webdataset is not installed.
    """
    with from_extra("webdataset", "webdataset needs a package of that name", "data.name"):
        from webdataset.tariterators import base_plus_ext
    found: Callable[[str], tuple[str | None, str | None]] = base_plus_ext
    return found


def shard_files(written: str, key: str) -> list[Path]:
    """The shards that a text with braces and `::` names; whether they exist is not looked up.

    Args:
        written: As in `train-{000..003}.tar`.
        key: The key under which it is written.

    Raises:
        SettingError: It names no local files, or one twice; webdataset is not installed.
    """
    split_name()
    from braceexpand import braceexpand

    if "://" in written or written.startswith("pipe:"):
        raise SettingError(key, f"expected local files, whose samples can be read in any order, got {written}")
    too_many = f"expected at most {count(_MOST_SHARDS, 'shard')}, got more from {written}"
    # braceexpand writes all numbers of a range down before it returns one.
    if any(abs(int(last) - int(first)) >= _MOST_SHARDS for first, last in _RANGE.findall(written)):
        raise SettingError(key, too_many)
    try:
        names = [name for part in written.split("::") for name in islice(braceexpand(part), _MOST_SHARDS + 1)]
    except ValueError as error:
        raise SettingError(key, f"expected braces as in train-{{000..003}}.tar, got {written}: {error}") from error
    if len(names) > _MOST_SHARDS:
        raise SettingError(key, too_many)
    twice = [name for name, number in Counter(names).items() if number > 1]
    if twice:
        raise SettingError(key, f"expected each shard once, got {shorten(twice, 5)} several times from {written}")
    return [Path(name).expanduser() for name in names]
