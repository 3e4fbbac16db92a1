"""The configuration of training in several processes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from mtl.config.types import Strict


class DistributedConfig(Strict):
    """How processes that torchrun has started train together; alone, none of it matters.

    Attributes:
        strategy: `ddp`: every process has the whole model, and gradients are averaged. `fsdp2`: every process has a
            part of every parameter, of its gradient and of what is remembered of it (moments, averages), and fetches
            the rest block by block while it computes. Each first builds the whole model. Features are not kept and
            gradients are not analysed; `compile`, fp16 and channels_last are refused.
        sync_batchnorm: Whether BatchNorm that trains takes its statistics over the images of all processes, at the
            price of two messages a layer; if not, over each one's own.
        checkpoint: How checkpoints of `fsdp2` are written; any number of processes, with either strategy, goes on from
            both. `plain`: the first process brings all together, and writes what one process alone would. `dcp`: each
            process writes its own parts, as torch.distributed.checkpoint does; `scripts/plain_checkpoint.py` makes
            plain ones of them. Alone, a run writes plain ones.
        timeout_s: How long a process waits for the others before it gives up.
    """

    strategy: Literal["ddp", "fsdp2"] = "ddp"
    sync_batchnorm: bool = False
    checkpoint: Literal["plain", "dcp"] = "plain"
    timeout_s: Annotated[float, Field(gt=0, le=86_400)] = 600.0

    @model_validator(mode="after")
    def _parts_are_those_of_a_spread_model(self) -> DistributedConfig:
        if self.checkpoint == "dcp" and self.strategy != "fsdp2":
            raise PydanticCustomError("checkpoint", "Input should have checkpoint: dcp only beside strategy: fsdp2")
        return self
