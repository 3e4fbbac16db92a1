"""Features spread over processes: the bits of one store, in 1/n of its memory."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch

import sharded_script
from mtl.distributed.world import World
from mtl.featurestore import RamStore, ShardedStore, batches_to_fill
from processes import run_in_processes
from sharded_script import FIELDS, NUM, compute


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 3])
def test_processes_read_what_one_store_would_give(number: int, tmp_path: Path) -> None:
    run_in_processes(Path(sharded_script.__file__).read_text(), tmp_path, number)
    for rank in range(number):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        for kind in ("ram", "disk"):
            got = found[kind]
            assert got["complete"] and got["equal"], kind
            assert got["nbytes"] == got["whole"] // NUM * len(range(rank, NUM, number))
            assert got["computed before"] == 0
        # Only the process whose store was lost computes, and only what was asked of it.
        assert found["ram"]["computed"] == 0
        assert (found["disk"]["computed"] > 0) == (rank == 1)


def test_alone_it_reads_as_any_store() -> None:
    store = ShardedStore(NUM, FIELDS, World.alone(), lambda num: RamStore(num, FIELDS))
    rows = torch.tensor([4, 1, 4, 22])
    got = store.read_every([rows], compute, torch.device("cpu"))
    assert all(a.equal(b) for a, b in zip(got, compute(rows), strict=True))
    assert store.num_present == 3
    assert all(a.equal(b) for a, b in zip(store.read(rows) or [], got, strict=True))


def test_by_itself_a_process_has_its_own_rows_only() -> None:
    store = ShardedStore(NUM, FIELDS, World(1, 3, 0), lambda num: RamStore(num, FIELDS))
    store.write(torch.arange(NUM), compute(torch.arange(NUM)))
    assert store.num_present == store.num_own == 8 and store.is_complete
    assert store.read(torch.tensor([1, 4])) is not None
    assert store.read(torch.tensor([1, 2])) is None


@pytest.mark.parametrize("keeps_last", [False, True])
def test_filling_covers_every_row_in_batches_of_one_process(keeps_last: bool) -> None:
    for first, num, size, number in product((0, 7), (1, 5, 8, 23), (1, 4, 8), (1, 2, 3)):
        worlds = [World(rank, number, 0) for rank in range(number)]
        filled = [batches_to_fill(first, num, size, keeps_last, world) for world in worlds]
        assert len({tuple(map(len, each)) for each in filled}) == 1  # all take part in the same
        width, last = min(size, num), num - num % min(size, num)
        for world, batches in zip(worlds, filled, strict=True):
            together = torch.cat(batches)
            own = [image for image in range(num) if (first + image) % number == world.rank]
            assert set(own) <= set(together.tolist()) and int(together.max()) < num
            for batch in batches:
                in_tail = keeps_last and bool((batch >= last).any())
                assert len(batch) == (num - last if in_tail else width)


def test_alone_filling_is_all_in_order() -> None:
    training, validation = (batches_to_fill(0, 10, 4, keeps, World.alone()) for keeps in (False, True))
    assert [b.tolist() for b in training] == [[0, 1, 2, 3], [4, 5, 6, 7], [6, 7, 8, 9]]
    assert [b.tolist() for b in validation] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
