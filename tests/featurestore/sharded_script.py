"""What `test_featurestore_sharded` runs in several processes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtl.distributed.world import World
from mtl.featurestore import DiskStore, FeatureStore, Field, RamStore, ShardedStore, batches_to_fill

WORLD = World.from_environment()
CPU = torch.device("cpu")
FIELDS = [Field((3, 2), torch.bfloat16), Field((), torch.int16), Field((5,), torch.bool), Field((2,), torch.float32)]
NUM, SIZE = 23, 8


def compute(rows: Tensor) -> list[Tensor]:
    """Features that encode the row."""
    return [
        (rows[:, None, None] * 10 + torch.arange(6).view(3, 2)).bfloat16(),
        rows.to(torch.int16) * 3,
        rows[:, None] % torch.arange(2, 7) == 0,
        rows[:, None].float().sqrt() * torch.tensor([1.0, -1.0]),
    ]


def check(store: ShardedStore, damage: Any) -> dict[str, Any]:
    num_computed = 0

    def count(rows: Tensor) -> list[Tensor]:
        nonlocal num_computed
        num_computed += len(rows)
        return compute(rows)

    reference = RamStore(NUM, FIELDS)
    reference.write(torch.arange(NUM), compute(torch.arange(NUM)))
    for batch in batches_to_fill(0, NUM, SIZE, True, WORLD):
        store.write(batch, compute(batch))
    found = {"complete": store.is_complete, "nbytes": store.nbytes, "whole": reference.nbytes, "equal": True}
    everything = [torch.randperm(NUM, generator=torch.Generator().manual_seed(seed))[:SIZE] for seed in range(3)]
    # Shares of a training batch, and whole batches of one round of validation, one of them smaller.
    asked = [WORLD.shares(each) for each in everything]
    asked.append([torch.arange(SIZE), torch.arange(16, NUM), torch.arange(SIZE)][: WORLD.size])
    asked.append([torch.tensor([3, 3, 6]), torch.tensor([1]), torch.tensor([0, 0])][: WORLD.size])
    for number, every in enumerate(asked):
        if number == 2:
            damage(store)
            found["computed before"] = num_computed
        got = store.read_every(every, count, CPU)
        expected = reference.read(every[WORLD.rank]) or []
        found["equal"] &= all(a.equal(b) and a.dtype == b.dtype for a, b in zip(got, expected, strict=True))
    return found | {"computed": num_computed}


def damage_disk(store: ShardedStore) -> None:
    if WORLD.rank == 1:
        store.close()


def on_disk(num_rows: int) -> FeatureStore:
    return DiskStore(Path(sys.argv[1], f"store{WORLD.rank}"), {"rank": WORLD.rank}, num_rows, FIELDS, 10**8)


if __name__ == "__main__":
    WORLD.start(CPU, timeout_s=600)
    with torch.inference_mode():
        found = {
            "ram": check(ShardedStore(NUM, FIELDS, WORLD, lambda num: RamStore(num, FIELDS)), lambda _: None),
            "disk": check(ShardedStore(NUM, FIELDS, WORLD, on_disk), damage_disk),
        }
    Path(sys.argv[1], f"{WORLD.rank}.json").write_text(json.dumps(found))
    WORLD.barrier()
    os._exit(0)
