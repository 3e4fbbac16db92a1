"""Linear heads computed as one product, with their weights joined in each step (`join_heads`)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from mtl.model.heads.linear import LinearHead


def joinable(heads: Mapping[str, nn.Module]) -> list[str]:
    """The tasks whose heads are linear maps of the pooled vector and nothing else."""
    return [name for name, head in heads.items() if type(head) is LinearHead and type(head.out) is nn.Linear]


def joined_outputs(heads: Mapping[str, nn.Module], pooled: Tensor) -> dict[str, Tensor]:
    """The outputs of joinable heads: those of each by itself, but for rounding.

    Args:
        heads: By task.
        pooled: "b f", the trunk's pooled vector.

    Returns:
        By task, "b num_outputs", views of one tensor.
    """
    weights: list[Tensor] = [head.get_parameter("out.weight") for head in heads.values()]
    biases: list[Tensor] = [head.get_parameter("out.bias") for head in heads.values()]
    outputs = functional.linear(pooled, torch.cat(weights), torch.cat(biases))
    return dict(zip(heads, torch.split(outputs, [len(own) for own in biases], dim=1), strict=True))
