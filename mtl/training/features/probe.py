"""Which activations of a trunk can be kept, measured on one batch."""

from __future__ import annotations

import time
from collections.abc import Collection
from functools import partial

import torch
from torch import Tensor

from mtl.model import MultiTaskModel
from mtl.model.prefix import Prefix
from mtl.model.prefix.trace import no_side_effects


class NotKept(Exception):  # noqa: N818
    """The reason why a phase keeps no features."""


def probe_prefix(model: MultiTaskModel, images: Tensor, tasks: Collection[str]) -> tuple[Prefix, float, bool]:
    """Finds which activations can be kept; the model stays as it is.

    Args:
        model: The model, with the phase's freeze in force.
        images: A batch as training has them, prepared for the trunk.
        tasks: The tasks that are trained or measured.

    Returns:
        What can be kept, how long it takes to compute for a batch, in seconds, and whether an image's activations have
        the same bits at another place in the batch.

    Raises:
        PrefixError: Nothing can be kept.
        NotKept: The trunk gives other features when it is cut.
    """
    trunk, read = model.trunk, partial(model.read, tasks=tasks)
    prefix = Prefix.record(trunk, read, images)
    with torch.no_grad():
        # A whole batch, as they are going to be; this also warms up what is timed next.
        with no_side_effects(trunk, images.device):
            plain = read(images)
        started = time.perf_counter()
        kept = prefix.compute(images)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        seconds = time.perf_counter() - started
        with no_side_effects(trunk, images.device):
            replayed = prefix.replay(kept)
        elsewhere = prefix.compute(images.flip(0).contiguous(memory_format=model.memory_format))
    if not all(map(torch.equal, plain.tensors(), replayed.tensors())):
        raise NotKept("the trunk gives other features without its frozen modules")
    # Kernels may compute the tail of a tensor, or of a thread's part of it, in another way (sigmoid, SiLU).
    return prefix, seconds, all(torch.equal(one, other.flip(0)) for one, other in zip(kept, elsewhere, strict=True))
