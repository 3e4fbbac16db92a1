"""`attention_pool`: a learned query pools tokens or the last map, for an output per image."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from mtl.config.types import Count, Strict
from mtl.model.heads.base import Head, start_near_zero
from mtl.model.trunk import Features, FeatureShape, Kind


class AttentionPoolHead(Head):
    """Multi-head attention of one learned query over the trunk's tokens, or the positions of its last map.

    The pooling of the Set Transformer (Lee et al., arXiv 1810.00825) with one seed, without its
    feed-forward layers. Keys have no bias: the same number added to all of a query's scores changes nothing, so that it
    would never train.
    """

    class Options(Strict):
        """Attributes:
        num_heads: Attention heads; they divide the channels of the trunk's features.
        """

        num_heads: Count = 4

    output: ClassVar[Literal["dense", "vector"]] = "vector"
    reads: frozenset[Kind] = frozenset({"tokens", "pyramid"})

    def __init__(self, shape: FeatureShape, num_outputs: int, num_heads: int = 4) -> None:
        """Raises:
        ValueError: The number of attention heads does not divide the channels, or the map has a single position.
        """
        super().__init__()
        self.reads = frozenset({"pyramid"}) if shape.tokens is None else frozenset({"tokens"})
        width = shape.pyramid[-1] if shape.tokens is None else shape.tokens
        if width % num_heads:
            raise ValueError(f"expected num_heads that divide the trunk's {width} channels, got {num_heads}")
        if shape.tokens is None and shape.sizes[-1] == (1, 1):
            raise ValueError("the trunk's last map has one position, so that nothing is weighed; use linear or mlp")
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(width)
        self.query = nn.Parameter(torch.empty(width))
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.pooled_norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, num_outputs)
        nn.init.normal_(self.query)
        start_near_zero(self.out)

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:  # noqa: ARG002 - one signature for all
        tokens = features.tokens
        if tokens is None or "tokens" not in self.reads:
            tokens = rearrange(features.pyramid[-1], "b c h w -> b (h w) c")
        tokens = self.norm(tokens)
        key, value = (
            rearrange(each, "b n (k c) -> b k n c", k=self.num_heads) for each in (self.key(tokens), self.value(tokens))
        )
        query = rearrange(self.query.to(key.dtype), "(k c) -> k 1 c", k=self.num_heads)
        # `len` would fix the batch size of an exported program.
        query = query.expand(tokens.shape[0], -1, -1, -1)
        pooled = functional.scaled_dot_product_attention(query, key, value)
        output: Tensor = self.out(self.pooled_norm(rearrange(pooled, "b k 1 c -> b (k c)")))
        return output
