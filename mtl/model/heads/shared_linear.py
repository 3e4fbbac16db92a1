"""A last layer whose outputs share one weight vector, for questions that differ in a threshold only."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from mtl.config import SettingError
from mtl.model.heads.base import Head, start_near_zero


class SharedLinear(nn.Linear):
    """One weight vector "1 c" for all outputs, and a bias for each: CORAL's layer (Cao et al., arXiv 1901.07884)."""

    def __init__(self, in_features: int, num_outputs: int) -> None:
        super().__init__(in_features, 1)
        self.bias = nn.Parameter(torch.empty(num_outputs))
        start_near_zero(self)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Args:
            input: "b c".

        Returns:
            "b num_outputs".
        """
        return functional.linear(input, self.weight) + self.bias


def share_weights(head: nn.Module, task: str) -> None:
    """Gives all outputs of a head one weight vector.

    Args:
        head: A head with an output per image.
        task: Its task's name.

    Raises:
        SettingError: Its last layer is not linear.
    """
    assert isinstance(head, Head)
    if type(head.out) is not nn.Linear:
        raise SettingError(
            f"tasks.{task}.head",
            f"all outputs of this task share one weight vector, so that the last layer `out` of its head has to be an"
            f" nn.Linear, got {type(head.out).__name__}",
        )
    head.out = SharedLinear(head.out.in_features, head.out.out_features)
