"""The allocator's thresholds, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# Eight blocks of 8 MB are freed and made again: their pages come from the system each time, or stay with the process.
FAULTS = """
import ctypes, resource
from mtl.runtime.memory import keep_freed_memory
if {keep}:
    assert keep_freed_memory()
malloc, free = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
malloc.restype, free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = faults()
for _ in range(8):
    blocks = [malloc(8 << 20) for _ in range(8)]
    for block in blocks:
        ctypes.memset(block, 1, 8 << 20)
    for block in blocks:
        free(block)
print(faults() - before)
"""


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="the allocator is not glibc's")
def test_memory_that_is_freed_is_kept_unless_the_user_says_otherwise() -> None:
    def faults(keep: bool, **environment: str) -> int:
        plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        ran = subprocess.run(
            [sys.executable, "-c", FAULTS.format(keep=keep)],
            env=plain | environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return int(ran.stdout)

    # In pages of 4 kB; where the system gives huge ones, there is little to see.
    plain, kept = faults(keep=False), faults(keep=True)
    if plain < 64 * 1024:
        pytest.skip("the system gives memory in large pages")
    assert kept < plain / 2
    assert faults(keep=True, MALLOC_MMAP_THRESHOLD_="65536") > 2 * kept
    assert faults(keep=True, GLIBC_TUNABLES="glibc.malloc.mmap_threshold=65536") > 2 * kept
