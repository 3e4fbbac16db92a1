"""Garbage collection, paused while many objects are made, none of them garbage: modules, models, cells of a table."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """Collects no reference cycles in the block.

    Collections look at all objects again and again while their number grows: a fifth of the time of importing torch and
    timm and of making a model.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
