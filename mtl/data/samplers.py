"""The order of images: which of them make each batch, by rank."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mtl.data.orders import Order
from mtl.distributed.world import ALONE, World


def training_shares(
    order: Order, batch_size: int, seed: int, epoch: int, skip: int = 0, world: World = ALONE
) -> list[list[Tensor]]:
    """The batches of one epoch in random order, each dealt to the ranks.

    A pure function of seed, epoch and position: a run that resumes inside an epoch gets exactly the batches that it
    would have got without the interruption, and no state has to be saved for that. Every batch is full: BatchNorm
    cannot train on one image.

    Args:
        order: The order of the images.
        batch_size: Images in one global batch, that of all ranks together.
        seed: That of the run.
        epoch: Which epoch of the run, from 0.
        skip: Batches at the beginning of the epoch that were trained on already.
        world: The ranks, which share each batch.

    Returns:
        By batch and rank, the indices of the images, "b", int64.

    Raises:
        ValueError: There are fewer batches than are to be skipped.
        WorldError: A global batch has fewer images than there are ranks.
    """
    total = order.num_batches(batch_size)
    if not 0 <= skip <= total:
        raise ValueError(f"skip: expected 0 to {total}, the batches of an epoch, got {skip}")
    return [world.shares(batch) for batch in order.batches(batch_size, seed, epoch)[skip:]]


def validation_shares(num_images: int, batch_size: int, world: World) -> Iterator[tuple[list[Tensor], bool]]:
    """Every image once over all ranks, in order, in the batches of one process, dealt out in turn.

    All ranks get equally many batches, since what they compute may need them all (FSDP, shared features).

    Yields:
        The indices of each rank's batch, "b", and whether this rank counts its own: a rank for which the last round
        has none left runs the first one of that round again.
    """
    parts = [torch.arange(start, min(start + batch_size, num_images)) for start in range(0, num_images, batch_size)]
    for start in range(0, len(parts), world.size):
        dealt = parts[start : start + world.size]
        yield [*dealt, *[dealt[0]] * (world.size - len(dealt))], world.rank < len(dealt)
