"""Several processes that train one model: the rank of this one, and the collectives between them.

Started by torchrun, every process takes its share of each global batch. In a world of one process, every method returns
its argument, and torch.distributed is not called.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtl.distributed.rendezvous import start_group
from mtl.distributed.statistics import HasStatistics, join_statistics, sum_statistics

TIMEOUT_S = 600.0
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


class WorldError(ValueError):
    """Processes that cannot train together."""


@dataclass(frozen=True)
class Flags:
    """A step's flags after the all-reduce, the same in every process.

    Attributes:
        stop: Whether any process was asked to stop.
        broken: Whether any process has found something broken.
        seconds: Those of rank 0, whose clock counts.
    """

    stop: bool
    broken: bool
    seconds: float


@dataclass(frozen=True)
class World:
    """The processes of a run, from the view of one of them.

    Attributes:
        rank: Of this process, from 0.
        size: How many there are.
        local_rank: Of this process on its machine: the number of its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.size and 0 <= self.local_rank < self.size):
            raise WorldError(f"expected ranks from 0 to {self.size - 1}, got {self.rank}, local {self.local_rank}")

    @classmethod
    def alone(cls) -> World:
        """One process."""
        return cls()

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> World:
        """As torchrun's variables have it; one process if they are not set.

        Raises:
            WorldError: The variables are incomplete, or are not numbers that fit each other.
        """
        environment = os.environ if environment is None else environment
        found = {name: environment[name] for name in _VARIABLES if name in environment}
        if not found:
            return cls.alone()
        if len(found) < len(_VARIABLES) or not all(text.isdecimal() for text in found.values()):
            got = ", ".join(f"{name}={text}" for name, text in found.items())
            raise WorldError(
                f"expected {', '.join(_VARIABLES)} as whole numbers, as torchrun sets them, got {got};"
                " start with torchrun, or unset them"
            )
        rank, size, local_rank = (int(found[name]) for name in _VARIABLES)
        return cls(rank, size, local_rank)

    @property
    def is_alone(self) -> bool:
        return self.size == 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and logs."""
        return self.rank == 0

    def start(self, device: torch.device, timeout_s: float = TIMEOUT_S) -> None:
        """Joins the other processes.

        Args:
            device: The device of this process: the CPU, or its own GPU (see `gpu`).
            timeout_s: How long a process waits for another one before it gives up.
        """
        if self.is_alone:
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        start_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", self.rank, self.size, timeout_s)

    def gpu(self) -> torch.device:
        """The GPU of this process.

        Raises:
            WorldError: There are fewer GPUs on this machine than processes.
        """
        if self.local_rank >= torch.cuda.device_count():
            raise WorldError(
                f"expected a GPU for every process on this machine, got {torch.cuda.device_count()} for process"
                f" {self.local_rank + 1}; start fewer: torchrun --nproc-per-node"
            )
        return torch.device("cuda", self.local_rank)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Runs a block in rank 0 first, then in the others."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    def close(self) -> None:
        """Leaves the process group; may be called again."""
        if not self.is_alone and dist.is_initialized():
            dist.destroy_process_group()

    # Division of work

    def shares(self, indices: Tensor) -> list[Tensor]:
        """The shares of a global batch by rank: in a row, of sizes that differ by one image at most.

        Args:
            indices: "b".

        Raises:
            WorldError: A process would be left without an image, which cannot go through the model.
        """
        if len(indices) < self.size:
            raise WorldError(
                f"expected a batch of at least {self.size} images, one for each process, got {len(indices)};"
                " raise data.batch_size, or start fewer processes"
            )
        return list(indices.tensor_split(self.size))

    # Collectives

    def all_reduce_flags(self, stop: bool = False, broken: bool = False, seconds: float = 0.0) -> Flags:
        """All-reduces flags between the CPUs, once a step: no device is waited for."""
        if self.is_alone:
            return Flags(stop, broken, seconds)
        sums = torch.tensor([stop, broken, seconds if self.is_main else 0.0], dtype=torch.float64)
        dist.all_reduce(sums)
        num_stop, num_broken, seconds_of_rank_0 = sums.tolist()
        return Flags(num_stop > 0, num_broken > 0, seconds_of_rank_0)

    def is_any(self, flags: Sequence[bool]) -> list[bool]:
        """Which flags are set on any rank, between the CPUs: no device is waited for."""
        if self.is_alone:
            return list(flags)
        sums = torch.tensor(flags, dtype=torch.int64)
        dist.all_reduce(sums)
        return [number > 0 for number in sums.tolist()]

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of a small tensor over the processes, detached."""
        return tensor.detach() if self.is_alone else self.sum(tensor) / self.size

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a small tensor over the processes, detached."""
        if self.is_alone:
            return tensor.detach()
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total

    def global_losses(self, losses: Tensor) -> Tensor:
        """The means of losses over the processes, with the gradient of this process's own.

        DDP's mean over the processes' gradients is then the gradient of any function of the global losses.
        """
        return losses if self.is_alone else losses + (self.mean(losses) - losses.detach())

    def average_buffers(self, module: nn.Module, names: Collection[str]) -> None:
        """Makes buffers equal in all processes: the mean of floats, rank 0's integers.

        For the statistics of trainable norm layers, which each process has of its own share.
        """
        if self.is_alone or not names:
            return
        buffers = dict(module.named_buffers(remove_duplicate=False))
        by_type: dict[torch.dtype, dict[int, Tensor]] = {}
        for name in sorted(names):
            buffer = buffers[name].detach()
            # A tensor of two names is taken once.
            by_type.setdefault(buffer.dtype, {})[id(buffers[name])] = buffer
        for dtype, found in by_type.items():
            flat = torch.cat([buffer.flatten() for buffer in found.values()])
            if dtype.is_floating_point or dtype.is_complex:
                dist.all_reduce(flat)
                flat /= self.size
            else:
                dist.broadcast(flat, src=0)
            for buffer, part in zip(
                found.values(), flat.split_with_sizes([b.numel() for b in found.values()]), strict=True
            ):
                buffer.copy_(part.view_as(buffer))

    def merge_metrics(self, metrics: Iterable[HasStatistics]) -> None:
        """Sums the statistics of metrics over all processes, integers exactly, floats in their own precision; or joins.

        Args:
            metrics: The same kinds in the same order on every process; one that has counted nothing adds zeros.
        """
        if self.is_alone:
            return
        each = list(metrics)
        sum_statistics([one for one in each if one.adds_up])
        join_statistics([one for one in each if not one.adds_up], self.size)

    def sum_in_place(self, tensor: Tensor) -> None:
        """Adds up a tensor on the CPU over the processes."""
        if not self.is_alone:
            dist.all_reduce(tensor)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value in every process: anything that JSON can hold; others may pass None."""
        if self.is_alone:
            return value
        content = json.dumps(value).encode() if self.is_main else b""
        length = torch.tensor([len(content)])
        dist.broadcast(length, src=0)
        message = torch.frombuffer(bytearray(content), dtype=torch.uint8) if self.is_main else None
        if message is None:
            message = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(message, src=0)
        return json.loads(bytes(message.tolist()))

    def barrier(self) -> None:
        """Waits for every process, on the CPUs, so that no GPU has to be guessed."""
        self.all_reduce_flags()


ALONE = World.alone()


def shares_of_means(weights: Tensor, totals: Tensor, world_size: int) -> Tensor:
    """Factors of the local mean losses that make their mean the mean over all labelled entries.

    A step has m micro-batches on each of w processes. The mean over these m w of `share * local mean loss` is then the
    mean that one batch of all images would have, and so are the gradients.

    Args:
        weights: "m t": the denominator of each local mean, by micro-batch and task.
        totals: "t": their sums over micro-batches and processes.
        world_size: w.

    Returns:
        "m t", float64; 0 where nothing is labelled anywhere.
    """
    weights, totals = weights.double(), totals.double()
    shares = weights * (len(weights) * world_size) / torch.where(totals > 0, totals, 1.0)
    return torch.where(totals > 0, shares, 0.0)


def is_lost(error: Exception) -> bool:
    """Whether an error means that another rank exited, or did not answer in time."""
    return isinstance(error, dist.DistError) or any(
        sign in str(error) for sign in ("Connection closed by peer", "Connection reset", "gloo", "Timed out waiting")
    )
