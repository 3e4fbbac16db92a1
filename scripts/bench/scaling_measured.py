"""What the host does more of with more devices or images, measured in one process of a pretended world of 1,024.

    OMP_NUM_THREADS=1 python scripts/bench/scaling_measured.py

Nothing is sent. The figures go into `MEASURED` of scripts/bench/scaling.py, which counts on with them.
"""

from __future__ import annotations

import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file

from mtl.distributed.world import World
from mtl.featurestore import Field, RamStore
from mtl.featurestore.sharded import ShardedStore, batches_to_fill
from mtl.runtime.fingerprint import fingerprint
from mtl.runtime.rng import random_state

_WORLD = World(0, 1024, 0)
_BATCH = 32 * _WORLD.size
_T = TypeVar("_T")


def main() -> None:
    for line in (_hashing, _order, _shares, _filling, _reading, _loading, _random_numbers):
        sys.stdout.write(line() + "\n")


def _timed(compute: Callable[[], _T]) -> tuple[float, _T]:
    started = time.perf_counter()
    result = compute()
    return time.perf_counter() - started, result


def _held(kind: str = "VmRSS") -> int:
    """Bytes of memory that this process has by now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind):
            return int(line.split()[1]) * 1024
    raise ValueError(f"expected a line {kind} in /proc/self/status, as Linux has it")


def _hashing() -> str:
    content = torch.zeros(100_000_000)
    rates = [content.nbytes / _timed(lambda: fingerprint(content))[0] for _ in range(7)]
    return f"fingerprint: {median(rates) / 1e9:.1f} GB/s ({min(rates) / 1e9:.1f} to {max(rates) / 1e9:.1f})"


def _order() -> str:
    num = 30_000_000
    seconds, order = _timed(lambda: torch.randperm(num))
    return f"permutation of {num:,} images: {order.nbytes / num:g} bytes and {1e9 * seconds / num:.1f} ns an image"


def _shares() -> str:
    order = torch.randperm(10_000_000)
    before = _held()
    # As mtl.data.samplers makes them before the first batch of an epoch.
    seconds, every = _timed(
        lambda: [_WORLD.shares(order[at : at + _BATCH]) for at in range(0, len(order) - _BATCH, _BATCH)]
    )
    num = sum(map(len, every))
    return f"{num:,} shares of batches: {(_held() - before) / num:.0f} bytes and {1e6 * seconds / num:.1f} us each"


def _filling() -> str:
    num = 1_000_000
    seconds, _ = _timed(lambda: batches_to_fill(0, num, _BATCH, False, _WORLD))
    pairs = num * _WORLD.size
    each = f"{1e9 * seconds / pairs:.2f} ns an image and rank"
    return f"who computes which features, {num:,} images: {seconds:.2f} s, {each}"


def _reading() -> str:
    store = ShardedStore(
        10_000_000, [Field((1,), torch.float32)], _WORLD, lambda num: RamStore(num, [Field((1,), torch.float32)])
    )
    every = _WORLD.shares(torch.randperm(10_000_000)[:_BATCH])

    def look() -> None:
        # The bookkeeping of ShardedStore.read_every, without what is read and sent.
        asked = [store._own(rows) for rows in every]
        _ = torch.cat(asked), [(every[0] % _WORLD.size == source).nonzero().flatten() for source in range(_WORLD.size)]

    seconds = median(_timed(look)[0] for _ in range(7))
    return f"who has which features, a step: {1e3 * seconds:.1f} ms, {1e6 * seconds / _WORLD.size:.1f} us a rank"


def _loading() -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "data.safetensors"
        save_file({"images": torch.ones(400_000_000, dtype=torch.uint8)}, file)
        before = _held("RssAnon"), _held("RssFile")
        images = load_file(file)["images"]
        total = int(images[::4096].sum())
        own, common = _held("RssAnon") - before[0], _held("RssFile") - before[1]
    assert total
    return (
        f"400 MB of images loaded: {own / 1e6:.0f} MB of this process's own, {common / 1e6:.0f} MB of the file's pages"
    )


def _random_numbers() -> str:
    return f"random numbers as they stand: {len(pickle.dumps(random_state(torch.device('cpu')))):,} bytes a rank"


if __name__ == "__main__":
    main()
