"""Where a warning comes from."""

from __future__ import annotations

import sys


def depth_outside(*modules: str) -> int:
    """How many calls lie between the caller, which is in one of some modules, and the code that is in none."""
    depth, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals["__name__"] in (*modules, "contextlib"):
        depth, frame = depth + 1, frame.f_back
    return depth
