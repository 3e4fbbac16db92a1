"""A block that must not wait for the GPU."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def no_device_sync() -> Iterator[None]:
    """Any call that waits for the current CUDA device raises."""
    with warnings.catch_warnings():
        # torch says of the mode that it is a prototype.
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
