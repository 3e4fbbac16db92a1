"""Garbage collection, paused while modules are imported and models are made."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """Collects no reference cycles in the block.

    torch, timm and a model are hundreds of thousands of objects, none of them garbage: collections while they are made
    look at all of them again and again, and take a fifth of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
