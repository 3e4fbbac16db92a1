"""What all verbs share: exit codes, and how one refuses its arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mtl.runtime.console import print_err

if TYPE_CHECKING:
    import argparse

    # What `add_parser` of each verb adds itself to.
    Verbs = argparse._SubParsersAction[argparse.ArgumentParser]

DONE, FAILED, WRONG_INPUT, VIOLATION = 0, 1, 2, 3


def refuse(reason: object) -> int:
    """Prints why the arguments are wrong; returns the exit code."""
    for line in str(reason).splitlines():
        print_err(f"error: {line}")
    return WRONG_INPUT
