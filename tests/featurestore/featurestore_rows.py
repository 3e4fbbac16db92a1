"""Rows that any process can make, and what the processes of test_featurestore_disk.py do."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import mmap
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtl.featurestore import DiskStore, Field

FIELDS = [Field((3, 2), torch.bfloat16), Field((), torch.float32)]
BIG = [Field((64, 128), torch.float32), Field((32, 64, 4), torch.float16)]  # 48 KB


def rows(indices: Tensor, fields: list[Field], key: str = "k") -> list[Tensor]:
    """Any bytes, the same for the same image and key; most floats among them are odd ones now and then."""
    parts = [[torch.empty(0, *field.shape, dtype=field.dtype)] for field in fields]
    for index in indices.tolist():
        make = np.random.default_rng([index, *key.encode()])
        for part, field in zip(parts, fields, strict=True):
            memory = torch.from_numpy(make.integers(0, 256, field.num_bytes, dtype=np.uint8))
            part.append(memory.view(field.dtype).reshape(1, *field.shape))
    return [torch.cat(part) for part in parts]


def memory(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same_bits(first: list[Tensor] | None, second: list[Tensor]) -> bool:
    return first is not None and all(
        a.dtype == b.dtype and a.shape == b.shape and memory(a) == memory(b) for a, b in zip(first, second, strict=True)
    )


def open_store(folder: Path, num_rows: int = 8, fields: list[Field] = FIELDS, key: str = "k", **more: Any) -> DiskStore:
    return DiskStore(folder, {"name": key}, num_rows, fields, **{"spare_bytes": 0, **more})


def fill(store: DiskStore, key: str = "k", batch: int = 3) -> None:
    for indices in torch.arange(store.num_rows).split(batch):
        store.write(indices, rows(indices, list(store.fields), key))


def filled(folder: Path, key: str = "k", **more: Any) -> DiskStore:
    store = open_store(folder, key=key, **more)
    fill(store, key)
    assert store.is_complete
    return store


# Processes


def _run_child(work: Callable[[], None], delay_s: float | None = None) -> bool:
    """Whether a child came to its end before it was killed."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    if delay_s is not None:
        time.sleep(delay_s)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0
    return os.WIFEXITED(status)


def _look(folder: Path, key: str, num_rows: int, fields: list[Field]) -> str:
    """Opens what a killed process left over: what the store is then, or what is wrong."""
    said = io.StringIO()
    logging.basicConfig(stream=said, level=logging.WARNING, force=True)
    with contextlib.closing(open_store(folder, num_rows, fields, key)) as store:
        if said.getvalue():
            return said.getvalue()
        if left := [path.name for path in folder.iterdir() if path.name.count(".") > 1]:
            return f"left over: {left}"
        if not store.is_complete:
            return "empty" if store.num_present == 0 and not store.path.exists() else "half"
        everything = torch.arange(num_rows)
        return "whole" if same_bits(store.read(everything), rows(everything, fields, key)) else "wrong"


def kill_at_every_file_operation(folder: Path) -> list[list[str]]:
    """A writer that must evict another entry is killed before its first file operation, its second, ..."""
    one = filled(folder / "size", "old").path
    most = int(1.5 * sum(file.stat().st_size for file in one.iterdir()))
    found = []
    while not found or found[-1][0] != "survived":
        place = folder / str(len(found))
        filled(place, "old").close()
        left = len(found)

        def work(place: Path = place, left: int = left) -> None:
            def count(event: str, _: tuple[Any, ...]) -> None:
                nonlocal left
                if event.startswith(("os.", "open", "shutil.", "fcntl.")):
                    left -= 1
                    if left == -1:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(count)
            store = open_store(place, key="new", max_bytes=most)
            fill(store, "new")
            store.close()
            left = -1

        survived = "survived" if _run_child(work) else "killed"
        found.append([survived, _look(place, "old", 8, FIELDS), _look(place, "new", 8, FIELDS)])
    return found


def kill_at_random(folder: Path, trials: int) -> list[list[str]]:
    def work() -> None:
        fill(open_store(folder, 48, BIG))

    indices = torch.arange(48)
    content = rows(indices, BIG)

    def fill(store: DiskStore) -> None:
        for at in indices.split(2):
            store.write(at, [tensor[at] for tensor in content])

    begin = time.perf_counter()
    assert _run_child(work)
    duration = time.perf_counter() - begin
    chance = random.Random(0)
    found = []
    for delay_s in [0.0, None, *(chance.uniform(0, 1.2 * duration) for _ in range(trials))]:
        with contextlib.closing(open_store(folder, 48, BIG)) as store:
            for file in store.path.glob("*"):
                file.unlink()
        if store.path.exists():
            store.path.rmdir()
        survived = "survived" if _run_child(work, delay_s) else "killed"
        found.append([survived, _look(folder, "k", 48, BIG)])
    return found


def fill_with_others(folder: Path, seed: int) -> dict[str, Any]:
    """Fills a store that others fill too, and reads all along."""
    (folder / f"ready-{seed}").touch()
    while len(list(folder.glob("ready-*"))) < 2:
        time.sleep(0.001)
    torch.manual_seed(seed)
    store = open_store(folder / "store", 96, BIG)
    num_wrong = 0
    for at in torch.randperm(96).split(5):
        store.write(at, rows(at, BIG))
        for again in (at, torch.randint(96, (4,))):
            read = store.read(again)
            num_wrong += read is not None and not same_bits(read, rows(again, BIG))
    (folder / f"done-{seed}").touch()
    # Both have it open at once.
    while len(list(folder.glob("done-*"))) < 2:
        time.sleep(0.001)
    everything = torch.arange(96)
    is_right = same_bits(store.read(everything), rows(everything, BIG))
    return {"wrong": num_wrong, "whole": store.is_complete, "right": is_right, "off": store.is_disabled}


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure_memory(folder: Path) -> dict[str, int]:
    """How much more memory is resident, at most, while a store of 400 MB is written and read twice."""
    num_rows = 8192
    content = [torch.randn(16, *field.shape).to(field.dtype) for field in BIG]
    store = open_store(folder, num_rows, BIG)
    before, most = resident_bytes(), 0
    for at in torch.randperm(num_rows).split(16):
        store.write(at, content)
        most = max(most, resident_bytes())
    written = most - before
    for at in torch.cat([torch.randperm(num_rows), torch.randperm(num_rows)]).split(16):
        assert store.read(at) is not None
        most = max(most, resident_bytes())
    read = most - before
    # That the meter would have seen it: the same file through a map.
    with (store.path / "rows.bin").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        np.frombuffer(pages, np.uint8)[::4096].copy()
        mapped = resident_bytes() - before
    return {"bytes": store.nbytes, "written": written, "read": read, "mapped": mapped}


if __name__ == "__main__":
    verb, place, *numbers = sys.argv[1:]
    print(json.dumps(globals()[verb](Path(place), *map(int, numbers))))  # noqa: T201
