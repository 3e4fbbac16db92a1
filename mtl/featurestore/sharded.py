"""Features sharded over processes: each keeps every `size`-th row, and sends the others what they ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from mtl.distributed.world import World
from mtl.featurestore.base import FeatureStore, Field

Compute = Callable[[Tensor], Sequence[Tensor]]


class ShardedStore(FeatureStore):
    """The rows `row % size == rank` in a store of this process; `read_every` is how all processes read together.

    The methods of every store are about this process's own rows alone, and communicate with no other process.
    """

    def __init__(
        self, num_rows: int, fields: Sequence[Field], world: World, make: Callable[[int], FeatureStore]
    ) -> None:
        """Args:
        num_rows: How many images there are for all processes together.
        fields: The tensors of one image.
        world: The processes.
        make: Makes the store of this process, given its number of rows.
        """
        super().__init__(num_rows, fields)
        self._world = world
        self.num_own = len(range(world.rank, num_rows, world.size))
        self._inner = make(max(1, self.num_own))
        self.is_disabled = self._inner.is_disabled

    @property
    def nbytes(self) -> int:
        """Bytes of this process's rows, when they are there."""
        return self._inner.nbytes

    @property
    def num_present(self) -> int:
        return self._inner.num_present

    @property
    def is_complete(self) -> bool:
        """All of this process's rows are there."""
        return self.num_present == self.num_own

    def read(self, indices: Tensor) -> list[Tensor] | None:
        """As in every store; None as well if a row is another process's."""
        own = self._own(indices)
        return self._inner.read(own // self._world.size) if len(own) == len(indices) > 0 else None

    def write(self, indices: Tensor, tensors: Sequence[Tensor]) -> None:
        """Keeps those of these rows that are this process's."""
        self._checked(indices)
        self._check_fit(tensors, len(indices))
        places = (indices % self._world.size == self._world.rank).nonzero().flatten()
        if len(places):
            own = [tensor if len(places) == len(tensor) else tensor[places.to(tensor.device)] for tensor in tensors]
            self._inner.write(indices[places] // self._world.size, own)
            self.is_disabled = self._inner.is_disabled

    def close(self) -> None:
        self._inner.close()

    def read_every(self, every: Sequence[Tensor], compute: Compute, device: torch.device) -> list[Tensor]:
        """Reads rows for all processes at once; each has to call it.

        Args:
            every: By rank, the rows that each process wants, "b"; the same on every process.
            compute: Gives features of rows of this process that its store does not have, or has damaged.
            device: Where they travel from and to: a GPU, over NCCL, or the CPU.

        Returns:
            For every field "b ...", in its dtype, on the device: the rows that this process wants.
        """
        rank, size = self._world.rank, self._world.size
        asked = [self._own(rows) for rows in every]
        sent = self._read_own(torch.cat(asked), compute)
        mine = every[rank]
        # They come grouped by the process that has them.
        places = [(mine % size == source).nonzero().flatten() for source in range(size)]
        order = self._to_device(torch.cat(places), device)
        batch = []
        # A tensor made in inference mode could not be saved for backward later.
        with torch.inference_mode(False), torch.no_grad():
            for tensor, field in zip(sent, self.fields, strict=True):
                # As bytes: not every backend sends every type.
                content = self._to_device(tensor, device).contiguous().reshape(len(tensor), -1 if len(tensor) else 1)
                content = content.view(torch.uint8).reshape(len(tensor), field.num_bytes)
                got = torch.empty(len(mine), field.num_bytes, dtype=torch.uint8, device=device)
                if self._world.is_alone:
                    got = content
                else:
                    dist.all_to_all_single(got, content, list(map(len, places)), list(map(len, asked)))
                rows = torch.empty_like(got)
                rows[order] = got
                batch.append(rows.view(field.dtype).reshape(len(mine), *field.shape))
        return batch

    @staticmethod
    def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
        if device.type == "cuda" and not tensor.is_cuda:
            tensor = tensor.pin_memory()  # itself, if it is pinned
        return tensor.to(device, non_blocking=True)

    def _own(self, indices: Tensor) -> Tensor:
        self._checked(indices)
        return indices[indices % self._world.size == self._world.rank]

    def _read_own(self, own: Tensor, compute: Compute) -> Sequence[Tensor]:
        if len(own) == 0:
            return [torch.empty(0, *field.shape, dtype=field.dtype) for field in self.fields]
        kept = self._inner.read(own // self._world.size)
        if kept is not None:
            return kept
        computed = compute(own)
        self._check_fit(computed, len(own))
        self.write(own, computed)
        return [tensor.detach().to(field.dtype) for tensor, field in zip(computed, self.fields, strict=True)]


def batches_to_fill(first: int, num_images: int, size: int, keeps_last: bool, world: World) -> list[Tensor]:
    """The batches that this process computes so that all rows of a split, or of a view of it, are stored.

    Bits can depend on the size of a batch. So all are of the sizes that one process would use, filled up with images
    computed twice if need be; and all processes have equally many, since a sharded model needs them all.

    Args:
        first: The row of the first image.
        num_images: Images in the split.
        size: Images in a batch.
        keeps_last: Whether the last images, too few for a batch, are one of their own, as in validation.
        world: The processes.

    Returns:
        Indices of images, "b", batch by batch; alone, all in order.
    """
    size = min(size, num_images)
    middle = num_images - num_images % size if keeps_last else num_images
    batches = []
    for start, stop, width in ((0, middle, size), (middle, num_images, num_images - middle)):
        images = torch.arange(start, stop)
        owner = (first + images) % world.size
        own = images[owner == world.rank]
        most = max((int((owner == rank).sum()) for rank in range(world.size)), default=0)
        # A process that owns none of them still takes part.
        pool = own if len(own) else images
        pool = pool.repeat(-(-width // max(1, len(pool)))) if len(pool) < width else pool
        for number in range(-(-most // width) if width else 0):
            end = max(width, min((number + 1) * width, len(pool)))
            batches.append(pool[end - width : end])
    return batches
