"""The `distributed` component of a configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from mtl.config.types import Strict


class DistributedConfig(Strict):
    """How the processes that torchrun starts train together. One process alone ignores all of it.

    Attributes:
        strategy: `ddp`: every process holds the whole model, and gradients are averaged. `fsdp2`: parameters,
            gradients, optimizer state and averages are sharded over the processes, and parameters are gathered block by
            block for the forward and backward; each process first builds the whole model. With `fsdp2`, features are
            not kept, the tasks' gradients are not analysed, and `compile`, `precision: fp16`, `memory_format:
            channels_last` and balancing methods that need whole gradients (`mtl.TaskWeights`) are refused.
        sync_batchnorm: Whether a trainable BatchNorm takes its statistics over the images of all processes, for two
            messages per layer; if not, over each process's own images. Refused with `compile`.
        checkpoint: How `fsdp2` writes checkpoints. `plain`: rank 0 gathers everything and writes what one process alone
            would. `dcp`: each process writes its own shards, by torch.distributed.checkpoint;
            `scripts/plain_checkpoint.py` converts them. Any number of processes, with either strategy, resumes from
            both. `dcp` is refused without `strategy: fsdp2`.
        timeout_s: Seconds that a process waits for the others before it gives up.
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
