"""What is made once for all worker processes of a test session."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Path]) -> Path:
    """What `make` returns for an empty folder, which the first worker to come here makes; the others wait for it.

    Tests must not write there.

    Args:
        factory: That of the session.
        name: One for each thing that is made.
        make: Makes it below a folder, and returns its path.
    """
    place = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent
    folder, made = place / f"once-{name}", place / f"once-{name}.json"
    with (place / f"once-{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            folder.mkdir()
            made.write_text(json.dumps(str(make(folder))))
    return Path(json.loads(made.read_text()))
