"""The `distributed` component of a configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from mtl.config.types import Strict


class DistributedConfig(Strict):
    """How the ranks that torchrun has started train together; without effect in a run of one process.

    Attributes:
        strategy: `ddp`: every rank has the full model, and gradients are averaged. `fsdp2`: every rank has a shard of
            every parameter, of its gradient, optimizer state and moving average, and gathers the rest block by block
            while it computes. Each rank first builds the full model. Features are not cached and gradients are not
            analysed; `compile`, fp16 and channels_last are refused.
        sync_batchnorm: Whether trainable BatchNorm computes its statistics over the images of all ranks, at the cost of
            two messages a layer; if not, over each rank's own images.
        checkpoint: How checkpoints of `fsdp2` are written; a run of any number of ranks and either strategy can resume
            from both. `plain`: rank 0 gathers the full tensors and writes what one process alone would. `dcp`: each
            rank writes its own shards, as torch.distributed.checkpoint does; `scripts/plain_checkpoint.py` converts
            them to plain checkpoints. A run of one process writes plain ones.
        timeout_s: How long a rank waits for the others before it exits.
    """

    strategy: Literal["ddp", "fsdp2"] = "ddp"
    sync_batchnorm: bool = False
    checkpoint: Literal["plain", "dcp"] = "plain"
    timeout_s: Annotated[float, Field(gt=0, le=86_400)] = 600.0

    @model_validator(mode="after")
    def _dcp_needs_fsdp2(self) -> DistributedConfig:
        if self.checkpoint == "dcp" and self.strategy != "fsdp2":
            raise PydanticCustomError("checkpoint", "Input should have checkpoint: dcp only with strategy: fsdp2")
        return self
