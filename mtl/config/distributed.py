"""The configuration of training in several processes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mtl.config.types import Strict


class DistributedConfig(Strict):
    """How processes that torchrun has started train together; alone, none of it matters.

    Attributes:
        strategy: `ddp`: every process has the whole model, and gradients are averaged. `fsdp2`: every process has a
            part of every parameter, of its gradient and of what is remembered of it (moments, averages), and fetches
            the rest block by block while it computes. Each first builds the whole model. Checkpoints are the same
            plain ones: any number of processes, with either strategy, goes on from them. Features are not kept and
            gradients are not analysed; `compile`, fp16 and channels_last are refused.
        sync_batchnorm: Whether BatchNorm that trains takes its statistics over the images of all processes, at the
            price of two messages a layer; if not, over each one's own.
        timeout_s: How long a process waits for the others before it gives up.
    """

    strategy: Literal["ddp", "fsdp2"] = "ddp"
    sync_batchnorm: bool = False
    timeout_s: Annotated[float, Field(gt=0, le=86_400)] = 600.0
