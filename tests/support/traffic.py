"""How many bytes of gradients DDP all-reduces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.distributed_c10d import GroupMember

from mtl.distributed.ddp import PhaseDDP


@dataclass
class Traffic:
    """Bytes of gradients that this process has sent to be averaged."""

    num_bytes: int = 0


def count_traffic(replica: PhaseDDP) -> Traffic:
    """Counts from now on what is averaged; nothing for one process."""
    traffic = Traffic()

    def count(_: object, bucket: Any) -> torch.futures.Future[Tensor]:
        traffic.num_bytes += bucket.buffer().nbytes
        group: Any = GroupMember.WORLD
        return allreduce_hook(group, bucket)

    # DDP accepts a hook without annotations, or with types themselves, not with their names.
    count.__annotations__.clear()

    for ddp in replica._ddp:
        ddp.register_comm_hook(None, count)
    return traffic
