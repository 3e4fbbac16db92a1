"""Where a warning comes from."""

from __future__ import annotations

import sys


def depth_outside(module: str) -> int:
    """How many calls lie between the caller, which is in a module, and the code that is not in it."""
    depth, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals["__name__"] in (module, "contextlib"):
        depth, frame = depth + 1, frame.f_back
    return depth
