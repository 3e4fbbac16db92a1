"""The C library's allocator: how soon it gives memory back to the system."""

from __future__ import annotations

import ctypes
import os
from functools import cache

# Parameters of glibc's `mallopt`, with their names in the environment (`MALLOC_TRIM_THRESHOLD_`, and as
# `glibc.malloc.trim_threshold` in `GLIBC_TUNABLES`), and our values in bytes: the largest that it takes as an int.
_PARAMETERS = {-3: ("mmap_threshold", 1 << 25), -1: ("trim_threshold", (1 << 31) - 1)}


@cache
def keep_freed_memory() -> bool:
    """Lets a process keep memory that a step frees for the next one: memory taken from the system costs page faults.

    What the user has set by the environment stays as it is.

    Returns:
        Whether the allocator has taken all of it; False where it is not glibc's.
    """
    if "CS_GNU_LIBC_VERSION" not in getattr(os, "confstr_names", {}) or not os.confstr("CS_GNU_LIBC_VERSION"):
        return False
    library = ctypes.CDLL(None)
    tunables = {each.partition("=")[0] for each in os.environ.get("GLIBC_TUNABLES", "").split(":")}
    mine = {
        key: value
        for key, (name, value) in _PARAMETERS.items()
        if f"MALLOC_{name.upper()}_" not in os.environ and f"glibc.malloc.{name}" not in tunables
    }
    taken = [library.mallopt(key, value) == 1 for key, value in mine.items()]
    return all(taken)
