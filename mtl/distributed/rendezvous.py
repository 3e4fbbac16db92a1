"""Rendezvous of the processes of one start, although torchrun may have started others before them.

torchrun keeps one store over all its restarts, and in it the addresses of processes that have ended (pytorch issue
135712). Its count of restarts does not distinguish starts: each machine counts its own. Hence every start has a name.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

_POLL_S = 0.02


def start_group(backend: str, rank: int, size: int, timeout_s: float) -> None:
    """Starts torch.distributed with the processes of this start, whatever the store holds of earlier ones.

    Args:
        backend: As torch takes it.
        rank: Of this process.
        size: Number of processes.
        timeout_s: How long a process waits for another one, now and later.

    Raises:
        DistStoreError: Not all processes came in time.
    """
    timeout = timedelta(seconds=timeout_s)
    found = rendezvous("env://", rank=rank, world_size=size, timeout=timeout)
    store: Store = next(iter(found))[0]
    own = PrefixStore(f"mtl/{fresh_name(store, rank, size, timeout_s)}", store)
    dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=timeout)


def fresh_name(store: Store, rank: int, size: int, timeout_s: float) -> str:
    """A name that no earlier start had, the same in all processes of this one.

    Rank 0 draws it; the others answer, each with a token of its own. Rank 0 repeats the tokens, which proves that the
    name is not an earlier one.

    Raises:
        DistStoreError: Not all processes came in time.
    """
    own = uuid.uuid4().hex
    if rank == 0:
        store.set("mtl/name", own)
        signed = [f"mtl/{own}/{other}" for other in range(1, size)]
        store.wait(signed, timedelta(seconds=timeout_s))
        store.set(f"mtl/{own}/all", " ".join(store.get(key).decode() for key in signed))
        return own
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if store.check(["mtl/name"]):
            name = str(store.get("mtl/name").decode())
            store.set(f"mtl/{name}/{rank}", own)
            if store.check([f"mtl/{name}/all"]) and own in store.get(f"mtl/{name}/all").decode().split():
                return name
        time.sleep(_POLL_S)
    raise dist.DistStoreError(f"Timed out waiting for the first of {size} processes: {timeout_s:g} s")
