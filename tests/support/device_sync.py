"""Blocks that must not wait for the GPU."""

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


@contextmanager
def device_stays_busy() -> Iterator[None]:
    """The current CUDA device has work before the block, and must not be done with it after the block.

    Finds what torch's own check does not: a copy from memory that is not pinned, which waits for the device.
    """
    torch.cuda.synchronize()
    matrix = torch.ones(4096, 4096, device="cuda")
    for _ in range(100):
        torch.mm(matrix, matrix)
    done: torch.cuda.Event = torch.cuda.current_stream().record_event()
    yield
    assert not done.query(), "the block has waited for the device, or has taken long"
    torch.cuda.synchronize()
