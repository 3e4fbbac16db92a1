"""Imports of packages that not everyone needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mtl.config import SettingError


@contextmanager
def from_extra(name: str, what: str, key: str) -> Iterator[None]:
    """Around the import of a package of an extra, which is slow to load.

    Args:
        name: The extra.
        what: What needs which package, at the beginning of the error.
        key: The key that asks for it.

    Raises:
        SettingError: It is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise SettingError(key, f"{what}; install it with: pip install 'mtl-freeze[{name}]'") from error
