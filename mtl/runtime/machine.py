"""The machine that a process runs on, as far as numbers depend on it."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path
from typing import Any


@cache
def machine() -> dict[str, Any]:
    """System, processor, the cores that this process may use, and bytes of memory; None for what is not known.

    Names of hosts and users are left out: what is written with it may be published.
    """
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _field("/proc/cpuinfo", "model name") or platform.processor() or None,
        "cores": _num_cores(),
        "memory_bytes": _memory_bytes(),
    }


def _num_cores() -> int | None:
    # Not everywhere can a process be bound to some of the cores.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _field(file: str, name: str) -> str | None:
    """The first value of a field in a file of lines `name : value`; None without such a file or field."""
    try:
        lines = Path(file).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in pairs if key.strip() == name), None)
