"""How far the memory of a device, or of the process, grows."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


@contextmanager
def peak_growth(device: torch.device) -> Iterator[list[int]]:
    """How far the memory grows at most inside: of the device, or of the process."""
    found = [0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found[0] = torch.cuda.max_memory_allocated(device) - before
    elif sys.platform == "linux":
        # Freed memory goes back to the system first, and 5 makes the present size the highest so far (proc(5)).
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        yield found
        found[0] = max(0, _status("VmHWM") - before)
    else:
        yield found


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])
